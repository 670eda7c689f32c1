"""Requests about a topic, most of them with one to three instructions on the form of the answer that a program can check.

The kinds are IFEval's (arXiv:2311.07911) and one of our own, the reward `instructions` judges them. Training and test share
no topic and no parameter, and the test has kinds that are nowhere else.

Topics, requests, and how an instruction of each kind is worded are in `instructions.yaml`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import yaml

from align.data.types import Example, Share, SplitName

LISTS: Mapping[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
REQUESTS: Sequence[str] = LISTS["requests"]
KINDS: Mapping[str, Mapping[str, Any]] = LISTS["kinds"]
UNSEEN = tuple(kind for kind, about in KINDS.items() if about.get("unseen"))
SEEN = tuple(kind for kind in KINDS if kind not in UNSEEN)
APART = [frozenset(kinds) for kinds in LISTS["apart"]]
APART += [frozenset({one, kind}) for one in KINDS if KINDS[one].get("alone") for kind in KINDS if kind != one]
"""Kinds of which a request has one at most."""
SPLIT_OF_TEN: Sequence[SplitName] = ("train",) * 6 + ("validation",) + ("test",) * 3
"""Which split every topic belongs to, by its place in its row."""

SIZES: Mapping[SplitName, int] = {"train": 3000, "validation": 200, "test": 600}
COUNTS, COUNT_WEIGHTS = (1, 2, 3), (6, 3, 1)
HELD_OUT_SHARE = 1 / 3
"""Of the test's requests, those with an instruction of a kind that is not trained on."""


def generate(split: SplitName, *, seed: int, plain_share: Share = 0.0, domain: str = "instructions") -> list[Example]:
    """The requests of `split`, drawn by `seed`, with what the reward `instructions` reads in their metadata.

    About `plain_share` of the training requests, or somewhat fewer since none comes twice, have no instructions: their answers are judged for being
    one alone.
    `metadata["unseen"]` says whether one of the kinds is only in the test.
    """
    seen: set[str] = set()
    examples: list[Example] = []
    for number in range(SIZES[split] * 4):
        name = f"{seed}:{split}:{number}"
        plain = split == "train" and Random(f"{name}:plain").random() < plain_share
        example = _example(split, number, Random(name), domain, plain=plain)
        if example.prompt_text not in seen and len(examples) < SIZES[split]:
            seen.add(example.prompt_text)
            examples.append(example)
    return examples


def _example(split: SplitName, number: int, draw: Random, domain: str, *, plain: bool) -> Example:
    topic = draw.choice(topics(split))
    chosen = [] if plain else _kinds(split, draw)
    made = [(kind, *_instruction(KINDS[kind], split, draw)) for kind in chosen]
    request = draw.choice(REQUESTS).format(topic)
    return Example(
        id=f"instructions/{split}/{number}",
        messages=({"role": "user", "content": " ".join([request, *(text for _, text, _ in made)])},),
        response=None,
        answer=None,
        domain=domain,
        metadata={
            "topic": [word for word in topic.split() if word not in LISTS["function_words"]],
            "instructions": [{"kind": kind, "args": args, "text": text} for kind, text, args in made],
            "unseen": any(kind in UNSEEN for kind in chosen),
        },
    )


def _kinds(split: SplitName, draw: Random) -> list[str]:
    """One to three kinds, no two of which are at odds."""
    wanted = draw.choices(COUNTS, COUNT_WEIGHTS)[0]
    chosen = [draw.choice(UNSEEN)] if split == "test" and draw.random() < HELD_OUT_SHARE else []
    for kind in draw.sample(SEEN, len(SEEN)):
        available = all(choices[split] for choices in KINDS[kind].get("arguments", {}).values())
        if len(chosen) < wanted and available and not any(kind in apart and apart & set(chosen) for apart in APART):
            chosen.append(kind)
    return draw.sample(chosen, len(chosen))


def _instruction(about: Mapping[str, Any], split: SplitName, draw: Random) -> tuple[str, dict[str, Any]]:
    """An instruction of a kind: its text, and the arguments of its checker."""
    if "either" in about:
        about = about["either"][draw.random() >= 0.5]
    args = {name: draw.choice(choices[split]) for name, choices in about.get("arguments", {}).items()}
    shown = list(args.values())
    for name, choices in about.get("sampled", {}).items():
        args[name] = draw.sample(choices[split], draw.randint(1, about["most"]))
        shown.append(", ".join(f'"{word}"' for word in args[name]))
    text = about["text"] if "text" in about else draw.choice(about["texts"])
    return text.format(*shown), args | about.get("fixed", {})


def topics(split: SplitName) -> list[str]:
    """The topics of a split; no topic is in two."""
    rows = [line.split("|") for line in LISTS["topics"].splitlines()]
    return [topic for row in rows for topic, its in zip(row, SPLIT_OF_TEN, strict=True) if its == split]
