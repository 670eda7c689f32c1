"""Verifiable instructions: requests that ask for a form that a program can check, in the manner of IFEval.

The requests are our own, made from a seed (IFEval itself is the harness's task `ifeval`). Accuracies are those of
Zhou et al. 2023 (arXiv:2311.07911, section 2.2): of whole prompts and of single instructions, strict and loose.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Annotated, Any

from pydantic import Field

from align.data.types import Message
from align.evaluate.asking import ask
from align.evaluate.hooks import Checkpoint, Metrics, register
from align.evaluate.instruction_checks import SEPARATOR, follows, follows_loosely
from rollout import Fleet

TASKS = [
    *("Write a short story about {}", "Describe {} to a child", "Write a letter to a friend about {}"),
    *("Write a speech about {}", "Explain why people care about {}", "Give advice to somebody who is new to {}"),
    *("Write an advertisement for a book about {}", "Tell what could go wrong with {}"),
]
TOPICS = [
    *("a lighthouse", "baking bread", "chess", "city bicycles", "deep snow", "gardens on roofs", "home cooking"),
    *("keeping bees", "learning to swim", "long train journeys", "maps", "mountain villages", "old clocks"),
    *("public libraries", "rain", "sailing", "the moon", "wooden toys", "young owls"),
]
WANTED = ["honest", "journey", "letter", "morning", "question", "silver", "simple", "together", "water", "winter"]
UNWANTED = ["always", "best", "good", "great", "important", "nice", "really", "thing", "very", "wonderful"]
OPENINGS = ["Let me begin with a question", "Once upon a time", "Strange as it sounds", "To tell the truth"]
CLOSINGS = ["And that is all.", "Is there anything else I can help with?", "Now it is your turn.", "The end."]
KEYS = ["author", "body", "closing", "keywords", "summary", "title", "year"]


@dataclass(frozen=True, slots=True)
class Instruction:
    """What is asked of the form of a response: `text` in words, `kind` and `params` for the check of that name."""

    kind: str
    text: str
    params: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt with the instructions that it contains."""

    id: str
    prompt: str
    instructions: Sequence[Instruction]


Draw = random.Random


def _count(low: int, high: int, text: str) -> Callable[[Draw, str], tuple[str, dict[str, Any]]]:
    def make(draw: Draw, request: str) -> tuple[str, dict[str, Any]]:
        count = draw.randint(low, high)
        return text.format(count), {"count": count}

    return make


def _plain(text: str) -> Callable[[Draw, str], tuple[str, dict[str, Any]]]:
    return lambda draw, request: (text, {})


def _limit(at_least: range, at_most: range, what: str) -> Callable[[Draw, str], tuple[str, dict[str, Any]]]:
    def make(draw: Draw, request: str) -> tuple[str, dict[str, Any]]:
        relation, counts = draw.choice([("at least", at_least), ("at most", at_most)])
        count = draw.choice(counts)
        return f"Use {relation} {count} {what}.", {"relation": relation, "count": count}

    return make


def _listed(words: Sequence[str]) -> str:
    return ", ".join(f'"{word}"' for word in words)


def _has_words(draw: Draw, request: str) -> tuple[str, dict[str, Any]]:
    wanted = draw.sample(WANTED, draw.randint(1, 3))
    return f"Use each of these words: {_listed(wanted)}.", {"wanted": wanted}


def _lacks_words(draw: Draw, request: str) -> tuple[str, dict[str, Any]]:
    unwanted = draw.sample(UNWANTED, draw.randint(2, 4))
    return f"Do not use any of these words: {_listed(unwanted)}.", {"unwanted": unwanted}


def _repeats_word(draw: Draw, request: str) -> tuple[str, dict[str, Any]]:
    word, count = draw.choice(WANTED), draw.randint(2, 4)
    return f'Use the word "{word}" at least {count} times.', {"word": word, "count": count}


def _repeats_letter(draw: Draw, request: str) -> tuple[str, dict[str, Any]]:
    letter, count = draw.choice("bfgkpvwy"), draw.randint(5, 12)
    return f'Use the letter "{letter}" at least {count} times.', {"letter": letter, "count": count}


def _begins_with(draw: Draw, request: str) -> tuple[str, dict[str, Any]]:
    phrase = draw.choice(OPENINGS)
    return f'Begin your answer with the words "{phrase}".', {"phrase": phrase}


def _ends_with(draw: Draw, request: str) -> tuple[str, dict[str, Any]]:
    phrase = draw.choice(CLOSINGS)
    return f'End your answer with exactly this sentence and nothing after it: "{phrase}"', {"phrase": phrase}


def _is_json(draw: Draw, request: str) -> tuple[str, dict[str, Any]]:
    keys = sorted(draw.sample(KEYS, draw.randint(2, 4)))
    return f"Give the whole answer as one JSON object with exactly these keys: {_listed(keys)}.", {"keys": keys}


def _repeats_request(draw: Draw, request: str) -> tuple[str, dict[str, Any]]:
    text = "Begin by repeating the first sentence of this request word for word, then give your answer."
    return text, {"request": request}


_MAKERS: Mapping[str, Callable[[Draw, str], tuple[str, dict[str, Any]]]] = {
    "all_capitals": _plain("Write the whole answer in capital letters."),
    "all_small": _plain("Write the whole answer in small letters, without a single capital."),
    "word_count": _limit(range(60, 201, 20), range(50, 151, 25), "words"),
    "sentence_count": _limit(range(4, 9), range(3, 7), "sentences"),
    "bullet_count": _count(2, 6, 'Give exactly {} bullet points, each on a line that begins with "* ".'),
    "paragraph_count": _count(2, 5, "Write exactly {} paragraphs, with a blank line between them."),
    "has_words": _has_words,
    "lacks_words": _lacks_words,
    "repeats_word": _repeats_word,
    "repeats_letter": _repeats_letter,
    "no_commas": _plain("Do not use any commas."),
    "begins_with": _begins_with,
    "ends_with": _ends_with,
    "quoted": _plain("Put the whole answer in double quotation marks."),
    "titled": _plain("Give your answer a title in double angular brackets, such as <<title>>."),
    "placeholder_count": _count(1, 4, "Use at least {} placeholders in square brackets, such as [name]."),
    "postscript": _plain('Add a postscript at the end, on a line that begins with "P.S."'),
    "repeats_request": _repeats_request,
    "two_answers": _plain(f"Give two different answers, and write only {SEPARATOR} between them."),
    "is_json": _is_json,
}
"""How each kind is drawn, from the first sentence of the request: its words, and the parameters of its check."""

_APART: Sequence[frozenset[str]] = [
    frozenset({"all_capitals", "all_small", "repeats_request", "is_json"}),
    frozenset({"word_count", "sentence_count", "bullet_count", "paragraph_count", "two_answers", "is_json"}),
    frozenset({"begins_with", "quoted", "repeats_request", "is_json"}),
    frozenset({"ends_with", "quoted", "postscript", "two_answers", "is_json"}),
    frozenset({"no_commas", "is_json"}),
    frozenset({"titled", "is_json"}),
    frozenset({"placeholder_count", "is_json"}),
    frozenset({"bullet_count", "paragraph_count", "postscript"}),
]
"""Kinds of which one request has one at most: they contradict each other, or one decides what another asks for."""


@register("instructions")
def instructions(
    checkpoint: Checkpoint,
    fleet: Fleet,
    *,
    count: Annotated[int, Field(ge=1)] = 200,
    max_new_tokens: Annotated[int, Field(ge=1)] = 512,
    seed: int = 0,
) -> Metrics:
    """Strict and loose accuracy on `count` requests that ask for a checkable form, by prompt and by instruction.

    The answers are greedy. Which requests are asked depends on the seed alone.
    """
    requests = make_requests(count, seed)
    conversations: dict[str, list[Message]] = {r.id: [{"role": "user", "content": r.prompt}] for r in requests}
    responses = ask(checkpoint, fleet, conversations, max_new_tokens=max_new_tokens, seed=seed)
    scores: dict[str, list[bool]] = defaultdict(list)
    rows: list[dict[str, Any]] = []
    for request in requests:
        text = responses[request.id].text
        strict = [follows(one.kind, one.params, text) for one in request.instructions]
        loose = [follows_loosely(one.kind, one.params, text) for one in request.instructions]
        for name, followed in (("strict", strict), ("loose", loose)):
            scores[f"prompt_{name}"].append(all(followed))
            scores[f"instruction_{name}"] += followed
        for one, followed_loosely in zip(request.instructions, loose, strict=True):
            scores[f"instruction_loose/{one.kind}"].append(followed_loosely)
        rows.append(
            {
                "id": request.id,
                "prompt": request.prompt,
                "completion": text,
                "truncated": responses[request.id].truncated,
                "instructions": [one.kind for one in request.instructions],
                "strict": strict,
                "loose": loose,
            }
        )
    return Metrics({name: fmean(values) for name, values in scores.items()}, rows=rows)


def make_requests(count: int, seed: int) -> list[Request]:
    """`count` requests with one to three instructions each, none of which contradicts another."""
    return [_request(f"instructions/{seed}/{number}") for number in range(count)]


def _request(id_: str) -> Request:
    draw = random.Random(id_)
    task = draw.choice(TASKS).format(draw.choice(TOPICS)) + "."
    wanted = draw.randint(1, 3)
    chosen: list[str] = []
    for kind in draw.sample(sorted(_MAKERS), len(_MAKERS)):
        if len(chosen) < wanted and not any(kind in group and group & set(chosen) for group in _APART):
            chosen.append(kind)
    made = [(kind, *_MAKERS[kind](draw, task)) for kind in chosen]
    instructions = [Instruction(kind, text, params) for kind, text, params in made]
    return Request(id_, " ".join([task, *(one.text for one in instructions)]), instructions)
