"""Requests about a topic with one to three instructions on the form of the answer that a program can check.

The kinds are IFEval's (arXiv:2311.07911) and one of our own, the reward `instructions` judges them. Training and test share
no topic and no parameter, and the test has kinds that are nowhere else.

Demonstrations are what a model itself says to a request, edited until it has the form that is asked for. The words stay the model's
own, so that it learns the form and little else. A program edits: it takes whole sentences, leaves out those with unwanted words,
changes the case, adds a title or an ending. What it made is right if the reward says so.

Topics, requests, and how an instruction of each kind is worded are in `instructions.yaml`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import yaml

from align.data.types import Example, Share, SplitName
from align.errors import UserError
from align.run.files import read_jsonl_lines
from reward import Sample
from reward.instructions import SENTENCES, check
from reward.prose import sentences

LISTS: Mapping[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
REQUESTS: Sequence[str] = LISTS["requests"]
KINDS: Mapping[str, Mapping[str, Any]] = LISTS["kinds"]
UNSEEN = tuple(kind for kind, about in KINDS.items() if about.get("unseen"))
SEEN = tuple(kind for kind in KINDS if kind not in UNSEEN)
APART = [frozenset(kinds) for kinds in LISTS["apart"]]
APART += [frozenset({one, kind}) for one in KINDS if KINDS[one].get("alone") for kind in KINDS if kind != one]
"""Kinds of which a request has one at most."""
# Those that a demonstration is edited for.
CAPITALS, SMALL = "change_case:english_capital", "change_case:english_lowercase"
NO_COMMA, QUOTED, ENDING = "punctuation:no_comma", "startend:quotation", "startend:end_checker"
TITLE, POSTSCRIPT = "detectable_format:title", "detectable_content:postscript"
BULLETS, WITH_WORDS, WITHOUT_WORDS = (
    "detectable_format:number_bullet_lists",
    "keywords:existence",
    "keywords:forbidden_words",
)
SPLIT_OF_TEN: Sequence[SplitName] = ("train",) * 6 + ("validation",) + ("test",) * 3
"""Which split every topic belongs to, by its place in its row."""

SIZES: Mapping[SplitName, int] = {"train": 3000, "validation": 200, "test": 600}
COUNTS, COUNT_WEIGHTS = (1, 2, 3), (6, 3, 1)
HELD_OUT_SHARE = 1 / 3
"""Of the test's requests, those with an instruction of a kind that is not trained on."""

ATTEMPTS = 30
MOST_SENTENCES = 4
MOST_CAPITALS = 250
"""Characters of an answer in capitals, which take twice as many tokens as others."""
_MARKS = re.compile(r"^\s*(?:[#>*•-]+|\d+[.)])\s+|\*+|__+|`+", re.MULTILINE)
_WITH_WORDS = ("It also makes me think of {}.", "There is a little of {} in it.", "Add {} to that.")

Instruction = tuple[str, Mapping[str, Any]]


def generate(
    split: SplitName,
    *,
    seed: int,
    answers: Path | None = None,
    aware_share: Share = 0.5,
    domain: str = "instructions",
) -> list[Example]:
    """The requests of `split`, drawn by `seed`, with what the reward `instructions` reads in their metadata.

    `metadata["unseen"]` says whether one of the kinds is only in the test. `answers` is a file of a model's own answers to plain
    requests (see `read_answers`): requests of other splits then come with a demonstration made of them, and
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
    topic = draw.choice(topics(split))
    chosen = _kinds(split, draw)
    made = [(kind, *_instruction(KINDS[kind], split, draw)) for kind in chosen]
    request = draw.choice(REQUESTS).format(topic)
    return Example(
        id=f"instructions/{split}/{number}",
        messages=({"role": "user", "content": " ".join([request, *(text for _, text, _ in made)])},),
        response=None,
        answer=None,
        domain=domain,
        metadata={
            "subject": topic,
            "request": request,
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


def plain_requests(of_a_topic: int) -> list[str]:
    """Requests about every topic that is not held out for the test, with nothing asked of their form."""
    return [
        request.format(topic)
        for split in ("train", "validation")
        for topic in topics(split)
        for request in Random(topic).sample(REQUESTS, of_a_topic)
    ]


def read_answers(path: Path) -> dict[str, list[str]]:
    """The sentences of each answer, by its request. Raises UserError with file and line."""
    if not path.is_file():
        raise UserError(
            f"there is no file {path} of a model's own answers; data_cards/instructions.md says how to get one"
        )
    answers = {}
    for line, row in read_jsonl_lines(path):
        if not isinstance(row.get("request"), str) or not isinstance(row.get("answer"), str):
            raise UserError(f'{path}, line {line}: needs "request" and "answer", both text')
        answers[row["request"]] = whole_sentences(row["answer"])
    return answers


def whole_sentences(text: str) -> list[str]:
    """The sentences of a text that come to their end, each once, without marks of lists and headings."""
    found = (sentence.strip().strip('"') for sentence in sentences(_MARKS.sub("", text)))
    return list(dict.fromkeys(sentence for sentence in found if re.search(r"\w.*[.!?]$", sentence)))


def answer(said: Sequence[str], topic: str, asked: Sequence[Instruction], sample: Sample, draw: Random) -> str | None:
    """The sentences `said` as an answer that the reward `instructions` passes, `sample` being one without its completion.

    None where `ATTEMPTS` drawn ones do not pass: a rare letter many times in two sentences, for one.
    """
    for _ in range(ATTEMPTS):
        text = _draft(said, topic, dict(asked), draw)
        short = len(text) <= MOST_CAPITALS or not text.isupper()
        if short and check(Sample(**{**vars(sample), "completion": text})).passes:
            return text
    return None


def unaware_answer(said: Sequence[str], draw: Random) -> str | None:
    """An answer to the request alone, whatever form it is asked to have; None where nothing was said."""
    return " ".join(said[: draw.randint(2, MOST_SENTENCES)]) or None


def _draft(said: Sequence[str], topic: str, asked: Mapping[str, Mapping[str, Any]], draw: Random) -> str:
    unwanted = asked.get(WITHOUT_WORDS, {}).get("forbidden_words", [])
    usable = [one for one in said if not any(re.search(rf"\b{word}\b", one, re.IGNORECASE) for word in unwanted)]
    count = draw.randint(1, MOST_SENTENCES)
    count = asked.get(SENTENCES, {}).get("num_sentences", count)
    count = asked.get(BULLETS, {}).get("num_bullets", count)
    own, rest = usable[:count], usable[count:]
    if WITH_WORDS in asked:
        found = " and ".join(asked[WITH_WORDS]["keywords"])
        own = [*own[: count - 1], draw.choice(_WITH_WORDS).format(found)] if count > 1 else own
    text = "\n".join(f"* {line}" for line in own) if BULLETS in asked else " ".join(own)
    if TITLE in asked:
        text = f"<<{topic[0].upper()}{topic[1:]}>>\n\n{text}"
    if ENDING in asked:
        text += ("\n" if BULLETS in asked else " ") + asked[ENDING]["end_phrase"]
    if POSTSCRIPT in asked and rest:
        text += f"\n\n{asked[POSTSCRIPT]['postscript_marker']} {rest[0]}"
    if NO_COMMA in asked:
        text = text.replace(",", "")
    text = text.upper() if CAPITALS in asked else text.lower() if SMALL in asked else text
    return f'"{text}"' if QUOTED in asked else text
