"""MT-Bench, AlpacaEval 2.0 and AlignBench: their questions, what a judge is shown, and what its verdicts amount to.

- MT-Bench (arXiv:2306.05685): each answer of a conversation of two turns gets a rating from 1 to 10.
- AlpacaEval 2.0: each answer is compared to the reference's in both orders, so that a preference is 0, 1/4, 1/2, 3/4
  or 1 (the authors draw one order, and weigh the judge's two verdicts by their probabilities).
  `align.statistics.length_controlled_win_rate` says what the length-controlled win rate is here.
- AlignBench (arXiv:2311.18743): each answer gets scores from 1 to 10 in several dimensions and over all.

The wording of the templates is our own, so that numbers compare between policies judged by the same judge, not with published
tables; a template file of the user's replaces it. Placeholders are those of `string.Template`.
"""

import re
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
from align.evaluate.hooks import PolicyCheckpoint
from align.statistics import length_controlled_win_rate
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

    checkpoint: PolicyCheckpoint
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
                *(self.checkpoint, self.fleet, asked),
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
    """`question` is a line of its file and `template` what the judge is told, which must have the `needed` placeholders.

    `cases` lets a respondent answer the questions and gives what is to be judged; `values` makes metrics of questions, cases
    and verdicts.
    """

    question: type[BaseModel]
    template: str
    needed: frozenset[str]
    cases: Callable[[Sequence[Any], Respondent], list[Case]]
    values: Callable[[Sequence[Any], Sequence[Case], Sequence[Any]], dict[str, float]]


MT_BENCH = """\
You judge the answers of an AI assistant. Read the conversation below, and judge the assistant's last answer only: is it
correct, does it do what the user asked for, is it complete, and is it easy to follow? Longer is not better.
$reference
<conversation>
$conversation
</conversation>

First say in a few sentences what is good and what is wrong about the last answer. Then rate it from 1 (useless) to 10
(nothing could be better). The last line of your judgement must be the rating in double square brackets, like [[5]].
"""
MT_BENCH_REFERENCE = "\nA good answer to the user's last message would be:\n<reference>\n{}\n</reference>\n"


class MtBenchQuestion(BaseModel):
    """A line of MT-Bench; `reference` may have a good answer for each turn."""

    question_id: int | str
    category: str
    turns: tuple[str, str]
    reference: list[str] = []


def mt_bench_cases(questions: Sequence[MtBenchQuestion], respondent: Respondent) -> list[Case]:
    """Both answers of each conversation; without the second where there is no room for it."""
    for question in questions:
        first, second = question.turns
        whole: list[Message] = [
            {"role": "user", "content": first},
            {"role": "assistant", "content": ""},
            {"role": "user", "content": second},
        ]
        if not respondent.room_for(whole, 2):
            raise UserError(
                f"judged: question {question.question_id} with two answers of {respondent.max_new_tokens} tokens does "
                f"not fit into rollout.max_length = {respondent.checkpoint.max_length}; raise that, or lower max_new_tokens"
            )
    conversations: list[list[Message]] = [[] for _ in questions]
    cases = []
    for turn in (0, 1):
        for question, conversation in zip(questions, conversations, strict=True):
            conversation.append({"role": "user", "content": question.turns[turn]})
        # Text that no tokenizer would have written can take more tokens to read than it took to write.
        going_on = [(q, c) for q, c in zip(questions, conversations, strict=True) if respondent.room_for(c, 1)]
        answers = respondent.answer([c for _, c in going_on], [q.category for q, _ in going_on])
        for (question, conversation), answer in zip(going_on, answers, strict=True):
            conversation.append({"role": "assistant", "content": answer})
            told = "\n\n".join(f"{one['role'].capitalize()}: {one['content']}" for one in conversation)
            good = "\n".join(question.reference[turn : turn + 1])
            fields = {"conversation": told, "reference": MT_BENCH_REFERENCE.format(good) if good else ""}
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


def read_rating(judgement: str) -> float | None:
    """The last rating in double square brackets, or None where there is none from 1 to 10."""
    found = re.findall(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]", judgement)
    return _in_range(found[-1]) if found else None


ALPACA_EVAL = """\
Two AI assistants were given the same instruction. Say which of their answers most people would prefer: the one that
follows the instruction better, is right, and is of more use. Neither the order of the answers nor their length matters.

<instruction>
$instruction
</instruction>

<answer_a>
$answer_a
</answer_a>

<answer_b>
$answer_b
</answer_b>

First give your reasons in a few sentences. The last line of your judgement must be [[A]] if answer A is better, [[B]]
if answer B is better, or [[C]] if neither is.
"""


class AlpacaEvalQuestion(BaseModel):
    """A line of AlpacaEval, with the reference's `output`; `difficulty` is the instruction's, where somebody has it."""

    instruction: str
    output: str
    difficulty: float | None = None


def alpaca_eval_cases(questions: Sequence[AlpacaEvalQuestion], respondent: Respondent) -> list[Case]:
    """Each answer twice: before and after the reference's."""
    conversations: list[list[Message]] = [[{"role": "user", "content": q.instruction}] for q in questions]
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


def read_choice(judgement: str) -> str | None:
    """ "A", "B", or "C" for neither: the last in double square brackets, or None where there is none."""
    found = re.findall(r"\[\[\s*([ABC])\s*\]\]", judgement)
    return found[-1] if found else None


ALIGN_BENCH = """\
请你担任公正的评审，评价一个人工智能助手对下面这个问题的回答。请从这些维度分别评价：$dimensions。

<问题>
$question
</问题>

<参考答案>
$reference
</参考答案>

<助手的回答>
$answer
</助手的回答>

请先对照参考答案，指出助手的回答好在哪里、错在哪里，并逐一说明每个维度的情况。
然后给每个维度打一个1到10的整数分，再给一个1到10的综合得分。
事实正确性和满足用户需求最为重要：答非所问、有根本错误或有害的回答，综合得分不超过2分。
质量与参考答案相当的回答得7到8分，只有明显优于参考答案的回答才能得9到10分。

最后一行必须是如下形式的全部得分：
$form
"""

OVERALL = "综合得分"
_FACTUAL = ("事实正确性", "满足用户需求", "清晰度", "完备性")
_LOGICAL = ("事实正确性", "满足用户需求", "逻辑连贯性", "完备性")
_CREATIVE = ("事实正确性", "满足用户需求", "逻辑连贯性", "创造性", "丰富度")
_ADVISING = ("事实正确性", "满足用户需求", "公平与可负责程度", "创造性")
ALIGN_BENCH_CATEGORIES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "数学计算": ("mathematics", _LOGICAL),
    "逻辑推理": ("logic", _LOGICAL),
    "基本任务": ("fundamental", _FACTUAL),
    "中文理解": ("chinese", _FACTUAL),
    "专业能力": ("professional", _FACTUAL),
    "综合问答": ("open", _ADVISING),
    "文本写作": ("writing", _CREATIVE),
    "角色扮演": ("role_play", _CREATIVE),
}
"""AlignBench's categories: our name of each, and the dimensions that its answers are judged by (arXiv:2311.18743).

The authors choose dimensions by subcategory; translation, which they count as creative, is the one that differs here.
"""
DIMENSIONS = {
    "事实正确性": "factuality",
    "满足用户需求": "user_need",
    "清晰度": "clarity",
    "完备性": "completeness",
    "逻辑连贯性": "coherence",
    "创造性": "creativity",
    "丰富度": "richness",
    "公平与可负责程度": "responsibility",
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
    answers = respondent.answer(
        [[{"role": "user", "content": question.question}] for question in questions], categories
    )
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


def read_dimensions(judgement: str, dimensions: Sequence[str]) -> dict[str, float] | None:
    """The last score of each dimension and of OVERALL, or None where one of them is not there from 1 to 10."""
    scores = {}
    for name in (*dimensions, OVERALL):
        found = re.findall(rf"{name}['\"’”]?\s*[:：]\s*(\d+(?:\.\d+)?)", judgement)
        score = _in_range(found[-1]) if found else None
        if score is None:
            return None
        scores[name] = score
    return scores


BENCHMARKS: Mapping[str, Benchmark] = {
    "mt_bench": Benchmark(MtBenchQuestion, MT_BENCH, frozenset({"conversation"}), mt_bench_cases, mt_bench_values),
    "alpaca_eval": Benchmark(
        AlpacaEvalQuestion,
        ALPACA_EVAL,
        frozenset({"instruction", "answer_a", "answer_b"}),
        alpaca_eval_cases,
        alpaca_eval_values,
    ),
    "align_bench": Benchmark(
        AlignBenchQuestion, ALIGN_BENCH, frozenset({"question", "answer"}), align_bench_cases, align_bench_values
    ),
}


def _means(scores: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: fmean(values) for name, values in scores.items()}


def _in_range(number: str) -> float | None:
    value = float(number)
    return value if 1 <= value <= 10 else None
