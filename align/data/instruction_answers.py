"""Demonstrations: what a model itself says to a request, edited until it has the form that is asked for.

The words stay the model's own, so that it learns the form and little else. A program edits: it takes whole sentences, leaves out
those with unwanted words, changes the case, adds a title or an ending. What it made is right if the reward says so.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from align.data import instruction_kinds as kinds
from align.data import instruction_words as lists
from align.errors import UserError
from align.run.files import read_jsonl_lines
from reward import Sample
from reward.instructions import judge
from reward.prose import sentences

ATTEMPTS = 30
MOST_SENTENCES = 4
MOST_CAPITALS = 250
"""Characters of an answer in capitals, which take twice as many tokens as others."""
_MARKS = re.compile(r"^\s*(?:[#>*•-]+|\d+[.)])\s+|\*+|__+|`+", re.MULTILINE)
_WITH_WORDS = ("It also makes me think of {}.", "There is a little of {} in it.", "Add {} to that.")

Instruction = tuple[str, Mapping[str, Any]]


def plain_requests(of_a_topic: int) -> list[str]:
    """Requests about every topic that is not held out for the test, with nothing asked of their form."""
    return [
        request.format(topic)
        for split in ("train", "validation")
        for topic in lists.topics(split)
        for request in Random(topic).sample(lists.REQUESTS, of_a_topic)
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
        if short and judge(Sample(**{**vars(sample), "completion": text})).passes:
            return text
    return None


def unaware_answer(said: Sequence[str], draw: Random) -> str | None:
    """An answer to the request alone, whatever form it is asked to have; None where nothing was said."""
    return " ".join(said[: draw.randint(2, MOST_SENTENCES)]) or None


def _draft(said: Sequence[str], topic: str, asked: Mapping[str, Mapping[str, Any]], draw: Random) -> str:
    unwanted = asked.get(kinds.WITHOUT_WORDS, {}).get("forbidden_words", [])
    usable = [one for one in said if not any(re.search(rf"\b{word}\b", one, re.IGNORECASE) for word in unwanted)]
    count = draw.randint(1, MOST_SENTENCES)
    count = asked.get(kinds.SENTENCES, {}).get("num_sentences", count)
    count = asked.get(kinds.BULLETS, {}).get("num_bullets", count)
    own, rest = usable[:count], usable[count:]
    if kinds.WITH_WORDS in asked:
        found = " and ".join(asked[kinds.WITH_WORDS]["keywords"])
        own = [*own[: count - 1], draw.choice(_WITH_WORDS).format(found)] if count > 1 else own
    text = "\n".join(f"* {line}" for line in own) if kinds.BULLETS in asked else " ".join(own)
    if kinds.TITLE in asked:
        text = f"<<{topic[0].upper()}{topic[1:]}>>\n\n{text}"
    if kinds.ENDING in asked:
        text += ("\n" if kinds.BULLETS in asked else " ") + asked[kinds.ENDING]["end_phrase"]
    if kinds.POSTSCRIPT in asked and rest:
        text += f"\n\n{asked[kinds.POSTSCRIPT]['postscript_marker']} {rest[0]}"
    if kinds.NO_COMMA in asked:
        text = text.replace(",", "")
    text = text.upper() if kinds.CAPITALS in asked else text.lower() if kinds.SMALL in asked else text
    return f'"{text}"' if kinds.QUOTED in asked else text
