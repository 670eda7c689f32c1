"""Needle in a haystack: a fact hidden in filler text of a given length, at a given depth, and asked for.

After Kamradt (2023) and the DeepSeek-V2 report, section 3.1.4. Filler and facts are made from the seed, so that no two
runs differ and nothing is to be downloaded.
"""

import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Annotated, Any

from pydantic import Field

from align.data.chat import encode_prompt
from align.data.types import Message
from align.errors import UserError
from align.evaluate.hooks import Metrics, PolicyCheckpoint, register
from rollout import Fleet

PLACES = [
    *("Aveiro", "Bergen", "Cork", "Delft", "Evora", "Ghent", "Hobart", "Izmir", "Jena", "Kobe", "Lugano", "Malaga"),
    *("Narvik", "Odense", "Padua", "Quito", "Riga", "Split", "Turku", "Udine", "Varna", "Wexford", "York", "Zadar"),
]
THINGS = [
    *("baker", "bridge", "clock", "ferry", "garden", "gardener", "harbour", "lantern", "library", "market", "miller"),
    *("museum", "orchard", "painter", "sailor", "teacher", "tower", "train", "village", "weaver", "window", "writer"),
]
VERBS = ["faces", "follows", "greets", "knows", "leaves", "likes", "meets", "misses", "passes", "remembers", "watches"]
QUALITIES = ["busy", "calm", "distant", "famous", "green", "narrow", "old", "patient", "quiet", "small", "tall"]
TIMES = ["at dawn", "at noon", "every day", "in autumn", "in spring", "in the evening", "in the rain", "on Sundays"]


@dataclass(frozen=True, slots=True)
class Haystack:
    """A conversation with a hidden fact. `tokens` are those of the prompt, `answer` is the number that is asked for."""

    id: str
    length: int
    depth: float
    messages: Sequence[Message]
    answer: str
    tokens: int


def ready(lengths: Sequence[int], max_new_tokens: int = 32, max_length: int | None = None) -> None:
    """Raise UserError for a length that there is no room for."""
    for length in lengths:
        if max_length is not None and length + max_new_tokens > max_length:
            raise UserError(
                f"needle: a prompt of {length} tokens with {max_new_tokens} new ones does not fit into "
                f"rollout.max_length = {max_length}; raise that, or leave the length out"
            )


@register("needle", ready=ready)
def needle(
    checkpoint: PolicyCheckpoint,
    fleet: Fleet,
    *,
    lengths: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)],
    depths: Annotated[Sequence[Annotated[float, Field(ge=0, le=1)]], Field(min_length=1)] = (0.0, 0.25, 0.5, 0.75, 1.0),
    per_cell: Annotated[int, Field(ge=1)] = 4,
    max_new_tokens: Annotated[int, Field(ge=1)] = 32,
    seed: int = 0,
) -> Metrics:
    """Recall of a fact hidden in prompts of `lengths` tokens at `depths` (0 is the beginning, 1 the end).

    `per_cell` facts for each length and depth. Recalled is what the greedy answer names as a number of its own. Raises
    UserError for a length that the fleet has no room for, or in which the question alone does not fit.
    """
    ready(lengths, max_new_tokens, checkpoint.max_length)
    haystacks = [
        haystack(checkpoint.tokenizer, length, depth, f"{seed}/{length}/{depth:g}/{number}")
        for length in lengths
        for depth in depths
        for number in range(per_cell)
    ]
    conversations = {hidden.id: hidden.messages for hidden in haystacks}
    responses = checkpoint.ask(fleet, conversations, max_new_tokens=max_new_tokens, seed=seed)
    rows: list[dict[str, Any]] = []
    found: dict[str, list[bool]] = defaultdict(list)
    for hidden in haystacks:
        response = responses[hidden.id]
        recalled = recalls(response.text, hidden.answer)
        for name in ("recall", f"recall/{hidden.length}", f"recall/{hidden.length}/{hidden.depth:g}"):
            found[name].append(recalled)
        rows.append(
            {
                "id": hidden.id,
                "length": hidden.length,
                "depth": hidden.depth,
                "prompt_tokens": hidden.tokens,
                "completion": response.text,
                "answer": hidden.answer,
                "recalled": recalled,
            }
        )
    return Metrics({name: fmean(values) for name, values in found.items()}, rows=rows)


def haystack(tokenizer: Any, length: int, depth: float, id_: str) -> Haystack:
    """The longest prompt of at most `length` tokens, with the fact after the share `depth` of its sentences.

    Everything in it follows from `id_`. Raises UserError where even without filler the prompt is longer.
    """
    draw = random.Random(id_)
    place, answer = draw.choice(PLACES), str(draw.randrange(100_000, 1_000_000))
    fact = f"The secret number of {place} is {answer}."
    room = length - len(encode_prompt(tokenizer, _messages([fact], place)))
    if room < 0:
        raise UserError(f"needle: {length} tokens are too few: the question alone takes {length - room}")
    sentences: list[str] = []
    filler = _filler(draw)
    while room >= 0:
        sentences.append(next(filler))
        room -= len(tokenizer(" " + sentences[-1], add_special_tokens=False)["input_ids"])
    # Sentences may take a token more together than each by itself.
    while True:
        at = round(depth * len(sentences))
        messages = _messages([*sentences[:at], fact, *sentences[at:]], place)
        tokens = len(encode_prompt(tokenizer, messages))
        if tokens <= length or not sentences:
            return Haystack(id_, length, depth, messages, answer, tokens)
        sentences.pop()


def recalls(text: str, answer: str) -> bool:
    """Whether a text names the number `answer`, alone or with commas between thousands."""
    return re.search(rf"(?<!\d){answer}(?!\d)", re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)) is not None


def _messages(sentences: Sequence[str], place: str) -> list[Message]:
    text = " ".join(sentences)
    question = f"What is the secret number of {place}? Answer with the number only."
    return [{"role": "user", "content": f"Read this text.\n\n{text}\n\n{question}"}]


def _filler(draw: random.Random) -> Iterator[str]:
    while True:
        one, other = draw.sample(THINGS, 2)
        quality, verb, time = draw.choice(QUALITIES), draw.choice(VERBS), draw.choice(TIMES)
        yield f"The {quality} {one} {verb} the {other} {time}."
