"""The kinds of instruction, under IFEval's names: how each is drawn, and which are at odds."""

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

from align.data import instruction_words as lists
from align.data.types import SplitName
from reward.instructions import SENTENCES

Made = tuple[str, dict[str, Any]]
Maker = Callable[[Random, SplitName], Made]


def _texts(*texts: str, **args: Any) -> Maker:
    """An instruction without choices, in one of several wordings."""
    return lambda draw, split: (draw.choice(texts), dict(args))


def _one(choices: lists.Choices, name: str, *texts: str, **more: Any) -> Maker:
    """An instruction with one parameter, chosen from those of the split; {} in the text stands for it."""

    def make(draw: Random, split: SplitName) -> Made:
        value = draw.choice(choices[split])
        return draw.choice(texts).format(value), {name: value, **more}

    return make


def _words(choices: lists.Choices, name: str, most: int, *texts: str) -> Maker:
    def make(draw: Random, split: SplitName) -> Made:
        found = draw.sample(choices[split], draw.randint(1, most))
        return draw.choice(texts).format(", ".join(f'"{word}"' for word in found)), {name: found}

    return make


def _length(draw: Random, split: SplitName) -> Made:
    if draw.random() < 0.5:
        count = draw.choice(lists.MOST_WORDS[split])
        text = draw.choice(
            ("Use less than {} words.", "Keep it under {} words.", "Your answer must have less than {} words.")
        )
        return text.format(count), {"num_words": count, "relation": "less than"}
    count = draw.choice(lists.LEAST_WORDS[split])
    text = draw.choice(
        ("Use at least {} words.", "Write {} words or more.", "Your answer must have at least {} words.")
    )
    return text.format(count), {"num_words": count, "relation": "at least"}


def _letters(draw: Random, split: SplitName) -> Made:
    letter, count = draw.choice(lists.LETTERS[split]), draw.choice(lists.LETTER_COUNTS[split])
    args = {"letter": letter, "let_frequency": count, "let_relation": "at least"}
    return f'The letter "{letter}" must appear at least {count} times.', args


def _frequency(draw: Random, split: SplitName) -> Made:
    word, count = draw.choice(lists.WANTED[split]), draw.choice(lists.HELD_OUT_COUNTS)
    return f'Use the word "{word}" at least {count} times.', {
        "keyword": word,
        "frequency": count,
        "relation": "at least",
    }


def _counted(name: str, text: str) -> Maker:
    def make(draw: Random, split: SplitName) -> Made:
        count = draw.choice(lists.HELD_OUT_COUNTS)
        return text.format(count), {name: count}

    return make


CAPITALS, SMALL = "change_case:english_capital", "change_case:english_lowercase"
NO_COMMA, QUOTED, ENDING = "punctuation:no_comma", "startend:quotation", "startend:end_checker"
LENGTH, BULLETS = "length_constraints:number_words", "detectable_format:number_bullet_lists"
TITLE, POSTSCRIPT = "detectable_format:title", "detectable_content:postscript"
WITH_WORDS, WITHOUT_WORDS = "keywords:existence", "keywords:forbidden_words"
LETTERS, FREQUENCY = "keywords:letter_frequency", "keywords:frequency"
JSON, HIGHLIGHTS = "detectable_format:json_format", "detectable_format:number_highlighted_sections"
PARAGRAPHS = "length_constraints:number_paragraphs"

KINDS: Mapping[str, Maker] = {
    CAPITALS: _texts(
        "Write in capital letters only.", "Use only capital letters.", "The whole answer must be in capital letters."
    ),
    SMALL: _texts(
        "Write in lowercase letters only.", "Use no capital letters.", "The whole answer must be in lowercase letters."
    ),
    NO_COMMA: _texts("Do not use any commas.", "Use no commas.", "Write without commas."),
    QUOTED: _texts("Put the whole answer in double quotation marks.", "Wrap your answer in double quotation marks."),
    TITLE: _texts(
        "Give it a title in double angular brackets, such as <<title>>.",
        "Begin with a title, wrapped in double angular brackets like <<this>>.",
    ),
    ENDING: _one(
        lists.ENDINGS,
        "end_phrase",
        'End with exactly this sentence: "{}"',
        'The last sentence must be "{}"',
        'Finish with the words "{}"',
    ),
    POSTSCRIPT: _one(lists.MARKERS, "postscript_marker", "At the end, add a postscript that starts with {}"),
    LENGTH: _length,
    SENTENCES: _one(
        lists.SENTENCES, "num_sentences", "Write exactly {} sentences.", "Answer in {} sentences, no more and no less."
    ),
    BULLETS: _one(
        lists.BULLETS,
        "num_bullets",
        'Answer with exactly {} bullet points, each on a line that begins with "* ".',
        'Give {} bullet points. Begin each with "* ".',
    ),
    WITH_WORDS: _words(
        lists.WANTED, "keywords", 2, "Use the words {}.", "Include the words {}.", "These words must appear: {}."
    ),
    WITHOUT_WORDS: _words(lists.UNWANTED, "forbidden_words", 3, "Do not use the words {}.", "Avoid the words {}."),
    LETTERS: _letters,
    JSON: _texts("Give the whole answer as JSON.", "Answer in JSON format, and write nothing else."),
    HIGHLIGHTS: _counted("num_highlights", "Highlight at least {} parts of the answer with *asterisks*."),
    PARAGRAPHS: _counted("num_paragraphs", "Write {} paragraphs, with *** on a line of its own between them."),
    FREQUENCY: _frequency,
}
"""How an instruction of each kind is drawn: its words, and the arguments of its checker."""
UNSEEN = (JSON, HIGHLIGHTS, PARAGRAPHS, FREQUENCY)
SEEN = tuple(kind for kind in KINDS if kind not in UNSEEN)
APART: Sequence[frozenset[str]] = [
    *(frozenset({JSON, kind}) for kind in KINDS if kind != JSON),
    frozenset({CAPITALS, SMALL}),
    frozenset({LENGTH, SENTENCES, BULLETS, PARAGRAPHS}),
    frozenset({QUOTED, ENDING, POSTSCRIPT}),
    frozenset({QUOTED, BULLETS}),
    frozenset({QUOTED, TITLE}),
    frozenset({SENTENCES, ENDING}),
    frozenset({SENTENCES, POSTSCRIPT}),
    frozenset({HIGHLIGHTS, BULLETS}),
    frozenset({WITH_WORDS, FREQUENCY}),
]
"""Kinds of which a request has one at most: they contradict each other, or one decides what another asks for."""
