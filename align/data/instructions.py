"""Requests about a topic with one to three instructions on the form of the answer that a program can check.

The kinds are IFEval's (arXiv:2311.07911) and one of our own, the reward `instructions` judges them. Training and test share
no topic and no parameter, and the test has kinds that are nowhere else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

from align.data import instruction_words as lists
from align.data.instruction_answers import answer, read_answers, unaware_answer
from align.data.instruction_kinds import APART, KINDS, POSTSCRIPT, SEEN, UNSEEN
from align.data.types import Example, SplitName
from align.errors import UserError
from reward import Sample

SIZES: Mapping[SplitName, int] = {"train": 3000, "validation": 200, "test": 600}
COUNTS, COUNT_WEIGHTS = (1, 2, 3), (6, 3, 1)
HELD_OUT_SHARE = 1 / 3
"""Of the test's requests, those with an instruction of a kind that is not trained on."""


def generate(
    split: SplitName,
    *,
    seed: int,
    answers: Path | None = None,
    aware_share: float = 0.5,
    domain: str = "instructions",
) -> list[Example]:
    """The requests of `split`, drawn by `seed`, with what the reward `instructions` reads in their metadata.

    `metadata["unseen"]` says whether one of the kinds is only in the test. `answers` is a file of a model's own answers to plain
    requests (see `align.data.instruction_answers`): requests of other splits then come with a demonstration made of them, and
    those for which there is none are left out. About `aware_share` follow the instructions, the others answer as if there were
    none. Raises UserError for a file that cannot be read, or has no answer to any request.
    """
    seen: set[str] = set()
    examples: list[Example] = []
    for number in range(SIZES[split] * 4):
        example = _example(split, number, Random(f"{seed}:{split}:{number}"), domain)
        if example.prompt_text not in seen and len(examples) < SIZES[split]:
            seen.add(example.prompt_text)
            examples.append(example)
    if answers is None or split == "test":
        return examples
    said = read_answers(answers)
    shown = [
        _demonstrated(e, said[e.metadata["request"]], aware_share, seed)
        for e in examples
        if e.metadata["request"] in said
    ]
    demonstrations = [example for example in shown if example.response is not None]
    if not demonstrations:
        raise UserError(
            f"{answers} has no answer to a {split} request; data_cards/instructions.md says how to get such a file"
        )
    return demonstrations


def _demonstrated(example: Example, said: Sequence[str], aware_share: float, seed: int) -> Example:
    draw = Random(f"{seed}:{example.id}")
    if draw.random() >= aware_share:
        return replace(example, response=unaware_answer(said, draw))
    asked = [(one["kind"], one["args"]) for one in example.metadata["instructions"]]
    sample = Sample(example.id, example.prompt_text, "", None, example.domain, metadata=example.metadata)
    return replace(example, response=answer(said, example.metadata["subject"], asked, sample, draw))


def _example(split: SplitName, number: int, draw: Random, domain: str) -> Example:
    topic = draw.choice(lists.topics(split))
    kinds = _kinds(split, draw)
    made = [(kind, *KINDS[kind](draw, split)) for kind in kinds]
    request = draw.choice(lists.REQUESTS).format(topic)
    return Example(
        id=f"instructions/{split}/{number}",
        messages=({"role": "user", "content": " ".join([request, *(text for _, text, _ in made)])},),
        response=None,
        answer=None,
        domain=domain,
        metadata={
            "subject": topic,
            "request": request,
            "topic": lists.key_words(topic),
            "instructions": [{"kind": kind, "args": args, "text": text} for kind, text, args in made],
            "unseen": any(kind in UNSEEN for kind in kinds),
        },
    )


def _kinds(split: SplitName, draw: Random) -> list[str]:
    """One to three kinds, no two of which are at odds."""
    wanted = draw.choices(COUNTS, COUNT_WEIGHTS)[0]
    chosen = [draw.choice(UNSEEN)] if split == "test" and draw.random() < HELD_OUT_SHARE else []
    for kind in draw.sample(SEEN, len(SEEN)):
        available = kind != POSTSCRIPT or lists.MARKERS[split]
        if len(chosen) < wanted and available and not any(kind in apart and apart & set(chosen) for apart in APART):
            chosen.append(kind)
    return draw.sample(chosen, len(chosen))
