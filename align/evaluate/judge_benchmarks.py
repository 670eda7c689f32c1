"""MT-Bench, AlpacaEval 2.0 and AlignBench: their questions, what a judge is shown, and what its verdicts amount to.

- MT-Bench (arXiv:2306.05685): each answer of a conversation of two turns gets a rating from 1 to 10.
- AlpacaEval 2.0: each answer is compared to the reference's in both orders, so that a preference is 0, 1/4, 1/2, 3/4
  or 1 (the authors draw one order, and weigh the judge's two verdicts by their probabilities).
  `align.statistics.length_controlled_win_rate` says what the length-controlled win rate is here.
- AlignBench (arXiv:2311.18743): each answer gets scores from 1 to 10 in several dimensions and over all.

What the judge is told is in `templates/`. The wording is our own, so that numbers compare between policies judged by the same
judge, not with published tables; a template file of the user's replaces it. Placeholders are those of `string.Template`.
"""

import re
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, ClassVar

from pydantic import BaseModel, Field, field_validator

from align.data.chat import encode_prompt
from align.data.types import Message
from align.errors import UserError
from align.evaluate.hooks import EvaluationError, PolicyCheckpoint, Response
from align.statistics import length_controlled_win_rate
from reward.rows import after_thought
from rollout import Fleet

TEMPERATURES = dict.fromkeys(("writing", "roleplay", "综合问答", "文本写作", "角色扮演"), 0.7) | dict.fromkeys(
    ("stem", "humanities", "数学计算", "逻辑推理", "专业能力", "中文理解", "基本任务"), 0.1
)
"""What the authors of MT-Bench and AlignBench sample a category's answers at; all others are greedy."""


class Question(BaseModel, ABC):
    """A line of a benchmark's file; `needed` are the placeholders that the judge's template must have."""

    question_id: int | str | None = None
    category: str = ""
    needed: ClassVar[frozenset[str]]

    @property
    @abstractmethod
    def requests(self) -> Sequence[str]:
        """What the user says, turn by turn."""

    @abstractmethod
    def shown(self, conversation: Sequence[Message], turn: int) -> dict[str, dict[str, str]]:
        """What fills the template, by name of the judgement, for each judgement of the answer that ends the conversation."""

    @abstractmethod
    def read(self, judgement: str) -> Any:
        """The verdict of a judgement, or None where it has none that can be read."""

    @staticmethod
    @abstractmethod
    def values(questions: Sequence[Any], cases: Sequence["Case"], verdicts: Sequence[Any]) -> dict[str, float]:
        """The metrics of the questions, from the verdicts on the cases."""


@dataclass(frozen=True, slots=True)
class Case:
    """An answer to be judged, its thought with it. `part` tells the cases of one question apart; `fields` fill the judge's template."""

    id: str
    question: Question
    prompt: str
    completion: str
    part: str
    fields: Mapping[str, str]


def answered(
    questions: Sequence[Question], checkpoint: PolicyCheckpoint, fleet: Fleet, *, max_new_tokens: int, seed: int
) -> list[Case]:
    """The policy's answers to the questions, turn by turn, as cases to be judged.

    A later turn is left out where the conversation has no room for it. Raises UserError for a question of several turns that
    might not fit from the start.
    """

    def fits(conversation: Sequence[Message], answers: int) -> bool:
        tokens = len(encode_prompt(checkpoint.tokenizer, conversation))
        return tokens + answers * max_new_tokens <= checkpoint.max_length

    for question in questions:
        first, *further = (Message(role="user", content=request) for request in question.requests)
        whole = [first, *(message for asked in further for message in (Message(role="assistant", content=""), asked))]
        if further and not fits(whole, len(question.requests)):
            raise UserError(
                f"judged: question {question.question_id} with two answers of {max_new_tokens} tokens does not fit into "
                f"rollout.max_length = {checkpoint.max_length}; raise that, or lower max_new_tokens"
            )
    conversations: dict[str, list[Message]] = {str(number): [] for number in range(len(questions))}
    temperatures = {key: TEMPERATURES.get(questions[int(key)].category, 0.0) for key in conversations}
    cases = []
    for turn in range(max(len(question.requests) for question in questions)):
        for key, conversation in conversations.items():
            conversation.append({"role": "user", "content": questions[int(key)].requests[turn]})
        # Text that no tokenizer would have written can take more tokens to read than it took to write.
        going_on = {key: each for key, each in conversations.items() if turn == 0 or fits(each, 1)}
        responses: dict[str, Response] = {}
        for temperature in sorted({temperatures[key] for key in going_on}):
            asked = {key: each for key, each in going_on.items() if temperatures[key] == temperature}
            responses |= checkpoint.ask(fleet, asked, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
        if turn == 0 and not any(response.tokens for response in responses.values()):
            raise EvaluationError(
                f"judged: none of {len(questions)} questions leaves room for {max_new_tokens} new tokens in rollout.max_length, "
                f"{checkpoint.max_length}; raise that, or lower max_new_tokens"
            )
        for key, conversation in going_on.items():
            question, answer = questions[int(key)], responses[key].text
            conversation.append({"role": "assistant", "content": answer})
            # What is judged is what was said after a thought; the conversation goes on with all of it, as the template takes it.
            said: list[Message] = [
                {"role": one["role"], "content": after_thought(one["content"])} if one["role"] == "assistant" else one
                for one in conversation
            ]
            name = str(int(key) + 1 if question.question_id is None else question.question_id)
            cases += [
                Case(name, question, question.requests[turn], answer, part, fields)
                for part, fields in question.shown(said, turn).items()
            ]
    return cases


class MtBenchQuestion(Question):
    """A line of MT-Bench; `reference` may have a good answer for each turn, which FastChat publishes in a file of its own."""

    question_id: int | str
    category: str
    turns: tuple[str, str]
    reference: list[str] = []
    needed = frozenset({"conversation"})

    @property
    def requests(self) -> Sequence[str]:
        return self.turns

    def shown(self, conversation: Sequence[Message], turn: int) -> dict[str, dict[str, str]]:
        """The conversation, and the good answer where there is one."""
        told = "\n\n".join(f"{one['role'].capitalize()}: {one['content']}" for one in conversation)
        good = "\n".join(self.reference[turn : turn + 1])
        return {f"turn {turn + 1}": {"conversation": told, "reference": REFERENCE.format(good) if good else ""}}

    def read(self, judgement: str) -> float | None:
        """The last rating in double square brackets, or None where there is none from 1 to 10."""
        found = re.findall(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]", judgement)
        return _in_range(found[-1]) if found else None

    @staticmethod
    def values(
        questions: Sequence["MtBenchQuestion"], cases: Sequence[Case], verdicts: Sequence[float | None]
    ) -> dict[str, float]:
        """Mean ratings, in [1, 10]: of all answers, by turn, by category; and the share of answers without room."""
        scores: dict[str, list[float]] = defaultdict(list)
        for case, rating in zip(cases, verdicts, strict=True):
            if rating is not None:
                for name in ("score", case.part.replace(" ", "_"), f"category/{case.question.category}"):
                    scores[name].append(rating)
        return _means(scores) | {"unanswered": 1 - len(cases) / (2 * len(questions))}


REFERENCE = "\nA good answer to the user's last message would be:\n<reference>\n{}\n</reference>\n"


class MtBenchChoice(BaseModel):
    """An answer: what was said turn by turn."""

    turns: list[str]


class MtBenchReference(BaseModel):
    """A line of FastChat's `reference_answer/gpt-4.jsonl`: a good answer to a question of MT-Bench."""

    question_id: int | str
    choices: list[MtBenchChoice] = Field(min_length=1)


class AlpacaEvalQuestion(Question):
    """A line of AlpacaEval, with the reference's `output`; `difficulty` is the instruction's, where somebody has it."""

    instruction: str
    output: str
    difficulty: float | None = None
    needed = frozenset({"instruction", "answer_a", "answer_b"})

    @property
    def requests(self) -> Sequence[str]:
        return (self.instruction,)

    def shown(self, conversation: Sequence[Message], turn: int) -> dict[str, dict[str, str]]:
        """The answer twice: before and after the reference's."""
        answer, instruction = conversation[-1]["content"], self.instruction
        return {
            "first": {"instruction": instruction, "answer_a": answer, "answer_b": self.output},
            "second": {"instruction": instruction, "answer_a": self.output, "answer_b": answer},
        }

    def read(self, judgement: str) -> str | None:
        """ "A", "B", or "C" for neither: the last in double square brackets, or None where there is none."""
        found = re.findall(r"\[\[\s*([ABC])\s*\]\]", judgement)
        return found[-1] if found else None

    @staticmethod
    def values(
        questions: Sequence["AlpacaEvalQuestion"], cases: Sequence[Case], verdicts: Sequence[str | None]
    ) -> dict[str, float]:
        """Win rates in [0, 1] over the questions with a verdict in both orders, and how often the orders agree."""
        as_a, as_b = {"A": 1.0, "B": 0.0, "C": 0.5}, {"A": 0.0, "B": 1.0, "C": 0.5}
        preferences, agreements, longer_by, difficulties = [], [], [], []
        for question, case, first, second in zip(questions, cases[::2], verdicts[::2], verdicts[1::2], strict=True):
            if first is not None and second is not None:
                preferences.append((as_a[first] + as_b[second]) / 2)
                agreements.append(as_a[first] == as_b[second])
                longer_by.append(len(after_thought(case.completion)) - len(question.output))
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


class AlignBenchQuestion(Question):
    """A line of AlignBench."""

    question_id: int | str
    category: str
    question: str
    reference: str
    needed = frozenset({"question", "answer"})

    @field_validator("category")
    @classmethod
    def _known(cls, category: str) -> str:
        if category not in ALIGN_BENCH_CATEGORIES:
            raise ValueError(f"{category!r} is none of AlignBench's categories: {', '.join(ALIGN_BENCH_CATEGORIES)}")
        return category

    @property
    def requests(self) -> Sequence[str]:
        return (self.question,)

    @property
    def scored(self) -> Sequence[str]:
        """The names of the scores that the judge gives: the dimensions of the category, and the one over all."""
        return (*ALIGN_BENCH_CATEGORIES[self.category][1], OVERALL)

    def shown(self, conversation: Sequence[Message], turn: int) -> dict[str, dict[str, str]]:
        """Question, reference and answer, with the dimensions."""
        fields = {
            "question": self.question,
            "reference": self.reference,
            "answer": conversation[-1]["content"],
            "dimensions": "、".join(self.scored[:-1]),
            "form": "{" + ", ".join(f"'{name}': 1到10" for name in self.scored) + "}",
        }
        return {"": fields}

    def read(self, judgement: str) -> dict[str, float] | None:
        """The last score of each name in `scored`, or None where one of them is not there from 1 to 10."""
        scores = {}
        for name in self.scored:
            found = re.findall(rf"{name}['\"’”]?\s*[:：]\s*(\d+(?:\.\d+)?)", judgement)
            score = _in_range(found[-1]) if found else None
            if score is None:
                return None
            scores[name] = score
        return scores

    @staticmethod
    def values(
        questions: Sequence["AlignBenchQuestion"], cases: Sequence[Case], verdicts: Sequence[Mapping[str, float] | None]
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


BENCHMARKS: Mapping[str, type[Question]] = {
    "mt_bench": MtBenchQuestion,
    "alpaca_eval": AlpacaEvalQuestion,
    "align_bench": AlignBenchQuestion,
}


def _means(scores: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: fmean(values) for name, values in scores.items()}


def _in_range(number: str) -> float | None:
    value = float(number)
    return value if 1 <= value <= 10 else None
