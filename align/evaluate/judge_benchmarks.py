"""MT-Bench, AlpacaEval 2.0 and AlignBench: their questions, what a judge is shown, and what its verdicts amount to.

Each is a `Benchmark`: `cases` lets the policy answer and gives what is to be judged, `values` makes metrics of the
verdicts.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

from pydantic import BaseModel, field_validator

from align.data.chat import encode_prompt
from align.data.types import Message
from align.errors import UserError
from align.evaluate.asking import ask
from align.evaluate.hooks import Checkpoint
from align.evaluate.judge_texts import (
    ALIGN_BENCH_CATEGORIES,
    DIMENSIONS,
    OVERALL,
    read_choice,
    read_dimensions,
    read_rating,
)
from align.evaluate.length_control import length_controlled_win_rate
from rollout import Fleet

TEMPERATURES = dict.fromkeys(("writing", "roleplay", "综合问答", "文本写作", "角色扮演"), 0.7) | dict.fromkeys(
    ("stem", "humanities", "数学计算", "逻辑推理", "专业能力", "中文理解", "基本任务"), 0.1
)
"""What the authors of MT-Bench and AlignBench sample a category's answers at; all others are greedy."""


@dataclass(frozen=True, slots=True)
class Case:
    """An answer to be judged: what the judge's template is filled with, and what reads its verdict (None: unreadable).

    `part` tells the cases of one question apart.
    """

    id: str
    category: str
    prompt: str
    completion: str
    part: str
    fields: Mapping[str, str]
    read: Callable[[str], Any]


@dataclass(frozen=True, slots=True)
class Respondent:
    """The policy, as one asks it the questions."""

    checkpoint: Checkpoint
    fleet: Fleet
    max_new_tokens: int
    seed: int

    def answer(self, conversations: Sequence[Sequence[Message]], categories: Sequence[str]) -> list[str]:
        """The answer to each conversation, at the temperature of its category."""
        answers = [""] * len(conversations)
        temperatures = [TEMPERATURES.get(category, 0.0) for category in categories]
        for temperature in sorted(set(temperatures)):
            asked = {str(i): conversations[i] for i, other in enumerate(temperatures) if other == temperature}
            responses = ask(
                self.checkpoint,
                self.fleet,
                asked,
                max_new_tokens=self.max_new_tokens,
                temperature=temperature,
                seed=self.seed,
            )
            for id_, response in responses.items():
                answers[int(id_)] = response.text
        return answers

    def room_for(self, conversation: Sequence[Message], answers: int) -> bool:
        """Whether so many more answers to a conversation fit into what the fleet takes."""
        tokens = len(encode_prompt(self.checkpoint.tokenizer, conversation))
        return tokens + answers * self.max_new_tokens <= self.checkpoint.max_length


@dataclass(frozen=True, slots=True)
class Benchmark:
    """`cases` maps questions and a respondent to cases; `values` maps questions, cases and verdicts to metrics."""

    question: type[BaseModel]
    cases: Callable[[Sequence[Any], Respondent], list[Case]]
    values: Callable[[Sequence[Any], Sequence[Case], Sequence[Any]], dict[str, float]]


class MtBenchQuestion(BaseModel):
    """A line of MT-Bench; `reference` may have a good answer for each turn."""

    question_id: int | str
    category: str
    turns: tuple[str, str]
    reference: list[str] = []


def mt_bench_cases(questions: Sequence[MtBenchQuestion], respondent: Respondent) -> list[Case]:
    """Both answers of each conversation; without the second where there is no room for it."""
    for question in questions:
        whole = [_user(question.turns[0]), _assistant(""), _user(question.turns[1])]
        if not respondent.room_for(whole, 2):
            raise UserError(
                f"judged: question {question.question_id} with two answers of {respondent.max_new_tokens} tokens does "
                f"not fit into rollout.max_length = {respondent.checkpoint.max_length}; raise that, or lower max_new_tokens"
            )
    conversations: list[list[Message]] = [[] for _ in questions]
    cases = []
    for turn in (0, 1):
        for question, conversation in zip(questions, conversations, strict=True):
            conversation.append(_user(question.turns[turn]))
        # Text that no tokenizer would have written can take more tokens to read than it took to write.
        going_on = [i for i, conversation in enumerate(conversations) if respondent.room_for(conversation, 1)]
        categories = [questions[i].category for i in going_on]
        answers = respondent.answer([conversations[i] for i in going_on], categories)
        for i, answer in zip(going_on, answers, strict=True):
            question, conversation = questions[i], conversations[i]
            conversation.append(_assistant(answer))
            fields = {
                "conversation": "\n\n".join(f"{one['role'].capitalize()}: {one['content']}" for one in conversation),
                "reference": _reference(question.reference[turn : turn + 1]),
            }
            id_, part = str(question.question_id), f"turn {turn + 1}"
            cases.append(Case(id_, question.category, question.turns[turn], answer, part, fields, read_rating))
    return cases


def mt_bench_values(
    questions: Sequence[MtBenchQuestion], cases: Sequence[Case], ratings: Sequence[float | None]
) -> dict[str, float]:
    """Mean ratings, in [1, 10]: of all answers, by turn, by category; and the share of answers without room."""
    scores: dict[str, list[float]] = defaultdict(list)
    for case, rating in zip(cases, ratings, strict=True):
        if rating is not None:
            for name in ("score", case.part.replace(" ", "_"), f"category/{case.category}"):
                scores[name].append(rating)
    return _means(scores) | {"unanswered": 1 - len(cases) / (2 * len(questions))}


class AlpacaEvalQuestion(BaseModel):
    """A line of AlpacaEval, with the reference's `output`; `difficulty` is the instruction's, where somebody has it."""

    instruction: str
    output: str
    difficulty: float | None = None


def alpaca_eval_cases(questions: Sequence[AlpacaEvalQuestion], respondent: Respondent) -> list[Case]:
    """Each answer twice: before and after the reference's."""
    conversations = [[_user(question.instruction)] for question in questions]
    cases = []
    answers = respondent.answer(conversations, [""] * len(questions))
    for number, (question, answer) in enumerate(zip(questions, answers, strict=True), start=1):
        for part, a, b in (("first", answer, question.output), ("second", question.output, answer)):
            fields = {"instruction": question.instruction, "answer_a": a, "answer_b": b}
            cases.append(Case(str(number), "", question.instruction, answer, part, fields, read_choice))
    return cases


def alpaca_eval_values(
    questions: Sequence[AlpacaEvalQuestion], cases: Sequence[Case], choices: Sequence[str | None]
) -> dict[str, float]:
    """Win rates in [0, 1] over the questions with a verdict in both orders, and how often the orders agree."""
    as_a, as_b = {"A": 1.0, "B": 0.0, "C": 0.5}, {"A": 0.0, "B": 1.0, "C": 0.5}
    preferences, agreements, longer_by, difficulties = [], [], [], []
    for question, case, first, second in zip(questions, cases[::2], choices[::2], choices[1::2], strict=True):
        if first is not None and second is not None:
            preferences.append((as_a[first] + as_b[second]) / 2)
            agreements.append(as_a[first] == as_b[second])
            longer_by.append(len(case.completion) - len(question.output))
            difficulties.append(question.difficulty)
    if not preferences:
        return {}
    known = [one for one in difficulties if one is not None]
    return {
        "win_rate": fmean(preferences),
        "length_controlled_win_rate": length_controlled_win_rate(
            preferences, longer_by, known if len(known) == len(difficulties) else None
        ),
        "same_in_both_orders": fmean(agreements),
        "longer_by": fmean(longer_by),
    }


class AlignBenchQuestion(BaseModel):
    """A line of AlignBench."""

    question_id: int | str
    category: str
    question: str
    reference: str

    @field_validator("category")
    @classmethod
    def _known(cls, category: str) -> str:
        if category not in ALIGN_BENCH_CATEGORIES:
            raise ValueError(f"{category!r} is none of AlignBench's categories: {', '.join(ALIGN_BENCH_CATEGORIES)}")
        return category


def align_bench_cases(questions: Sequence[AlignBenchQuestion], respondent: Respondent) -> list[Case]:
    """Each answer once, with the dimensions of its category."""
    categories = [question.category for question in questions]
    cases = []
    answers = respondent.answer([[_user(question.question)] for question in questions], categories)
    for question, answer in zip(questions, answers, strict=True):
        names = ALIGN_BENCH_CATEGORIES[question.category][1]
        fields = {
            "question": question.question,
            "reference": question.reference,
            "answer": answer,
            "dimensions": "、".join(names),
            "form": "{" + ", ".join(f"'{name}': 1到10" for name in (*names, OVERALL)) + "}",
        }
        read = partial(read_dimensions, dimensions=names)
        cases.append(Case(str(question.question_id), question.category, question.question, answer, "", fields, read))
    return cases


def align_bench_values(
    questions: Sequence[AlignBenchQuestion], cases: Sequence[Case], verdicts: Sequence[Mapping[str, float] | None]
) -> dict[str, float]:
    """Mean scores, in [1, 10], by category and by dimension; of reasoning and of language the means over categories.

    `overall` is the mean of reasoning and language, as the authors have it: only where there is something of both.
    """
    scores: dict[str, list[float]] = defaultdict(list)
    for question, verdict in zip(questions, verdicts, strict=True):
        for name, score in (verdict or {}).items():
            category = ALIGN_BENCH_CATEGORIES[question.category][0]
            scores[f"category/{category}" if name == OVERALL else f"dimension/{DIMENSIONS[name]}"].append(score)
    values = _means(scores)
    by_category = {name: value for name, value in values.items() if name.startswith("category/")}
    reasoning = {"category/mathematics", "category/logic"}
    parts = {
        "reasoning": [value for name, value in by_category.items() if name in reasoning],
        "language": [value for name, value in by_category.items() if name not in reasoning],
    }
    values |= {part: fmean(means) for part, means in parts.items() if means}
    return values | ({"overall": fmean(map(fmean, parts.values()))} if all(parts.values()) else {})


BENCHMARKS: Mapping[str, Benchmark] = {
    "mt_bench": Benchmark(MtBenchQuestion, mt_bench_cases, mt_bench_values),
    "alpaca_eval": Benchmark(AlpacaEvalQuestion, alpaca_eval_cases, alpaca_eval_values),
    "align_bench": Benchmark(AlignBenchQuestion, align_bench_cases, align_bench_values),
}


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _reference(answers: Sequence[str]) -> str:
    given = "\n".join(answers)
    return (
        f"\nA good answer to the user's last message would be:\n<reference>\n{given}\n</reference>\n" if given else ""
    )


def _means(scores: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: fmean(values) for name, values in scores.items()}
