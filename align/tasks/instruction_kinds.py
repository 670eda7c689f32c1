"""What generated instructions are made of: topics, requests, words, and the kinds, under IFEval's names.

No topic and no parameter of an instruction is in two splits.
"""

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

from align.data.types import SplitName
from reward.instructions import SENTENCES

Choices = Mapping[SplitName, Sequence[Any]]


def words(text: str) -> list[str]:
    """The words of a list that is written as one text."""
    return text.split()


REQUESTS = [
    *("Write a short paragraph about {}.", "Describe {} to a child.", "Tell me something interesting about {}."),
    *(
        "Explain briefly why people care about {}.",
        "Write a short note to a friend about {}.",
        "Tell a very short story about {}.",
    ),
    *("Give a beginner a little advice about {}.", "Say in a sentence or two what comes to mind about {}."),
    *("What would you tell a visitor about {}?", "Write a few lines about {}."),
]
SPLIT_OF_TEN: Sequence[SplitName] = ("train",) * 6 + ("validation",) + ("test",) * 3
"""Which split every topic belongs to, by its place in the list."""
TOPICS = """
lighthouses|baking bread|chess|city bicycles|deep snow|roof gardens|home cooking|keeping bees|learning to swim|train journeys
paper maps|mountain villages|old clocks|public libraries|summer rain|sailing|the moon|wooden toys|owls|making tea
rivers|street music|pottery|the desert|whales|night markets|knitting|old bridges|cats|growing tomatoes
a first day at school|volcanoes|handwritten letters|camping|dolphins|a good breakfast|photography|the seaside|horses|fireworks
learning a language|autumn leaves|museums|coffee|penguins|jazz|climbing hills|the stars|lost keys|dancing
bicycle repair|honey|castles|rainbows|elephants|school lunches|long walks|cheese|the harbour|puppies
fishing|orchards|board games|islands|parrots|winter sports|running|chocolate|waterfalls|the post office
birdwatching|bamboo|sandwiches|subways|turtles|kites|drawing|soup|caves|grandparents
skating|sunflowers|robots|the weather|wolves|puzzles|singing in a choir|apples|windmills|neighbours
painting a room|mushrooms|airports|spiders|football|a family dinner|poetry|oranges|canals|farms
yoga|roses|satellites|crows|tennis|picnics|magic tricks|rice|tunnels|babies
sewing|cactus plants|electric cars|bats|swimming pools|birthdays|comic books|pancakes|glaciers|teachers
carpentry|seaweed|telephones|foxes|basketball|weddings|theatre|salt|forests|doctors
gardening|pine trees|computers|ants|marathons|parades|radio|garlic|beaches|firefighters
origami|lavender|microscopes|butterflies|table tennis|snowmen|cinema|lemons|lakes|sailors
archery|moss|batteries|frogs|juggling|holidays|newspapers|carrots|swamps|pilots
"""
FUNCTION_WORDS = frozenset(words("a an and at first good in long of old the to"))

WANTED: Choices = {
    "train": words(
        "honest journey morning question simple together water winter bright garden patient window evening friend gentle "
        "promise quiet remember story yellow careful dream early music"
    ),
    "validation": words("forever kitchen lucky shadow treasure whisper"),
    "test": words("silver letter silence corner secret answer paper warm shoulder honour distance yesterday"),
}
UNWANTED: Choices = {
    "train": words("very really good great nice thing important beautiful many people"),
    "validation": words("amazing lovely often place"),
    "test": words("always best wonderful special world time"),
}
ENDINGS: Choices = {
    "train": ["And that is all.", "Now it is your turn.", "The end.", "What do you think?", "Try it and see."],
    "validation": ["Thank you for reading.", "So it goes."],
    "test": ["Is there anything else?", "I hope this helps.", "That is my view."],
}
MARKERS: Choices = {"train": ["P.S."], "validation": [], "test": ["P.P.S"]}
SOME_LETTERS: Choices = {"train": list("bdgmpwy"), "validation": list("k"), "test": list("cfhv")}
LETTER_COUNTS: Choices = {"train": [4, 6, 8], "validation": [9], "test": [5, 7]}
MOST_WORDS: Choices = {"train": [20, 30, 45, 60], "validation": [35], "test": [25, 40, 50]}
LEAST_WORDS: Choices = {"train": [20, 30, 45], "validation": [35], "test": [25, 40]}
SENTENCE_COUNTS: Choices = {"train": [2, 4], "validation": [6], "test": [3, 5]}
BULLET_COUNTS: Choices = {"train": [2, 4], "validation": [6], "test": [3, 5]}
"""Only the test has the kinds that these are for."""
HELD_OUT_COUNTS = (2, 3)


def topics(split: SplitName) -> list[str]:
    """The topics of a split."""
    rows = [line.split("|") for line in TOPICS.split("\n") if line]
    return [topic for row in rows for topic, its in zip(row, SPLIT_OF_TEN, strict=True) if its == split]


def key_words(topic: str) -> list[str]:
    """The words of a topic of which an answer to it has one."""
    return [word for word in topic.split() if word not in FUNCTION_WORDS]


Made = tuple[str, dict[str, Any]]
Maker = Callable[[Random, SplitName], Made]


def _texts(*texts: str, **args: Any) -> Maker:
    """An instruction without choices, in one of several wordings."""
    return lambda draw, split: (draw.choice(texts), dict(args))


def _one(choices: Choices, name: str, *texts: str, **more: Any) -> Maker:
    """An instruction with one parameter, chosen from those of the split; {} in the text stands for it."""

    def make(draw: Random, split: SplitName) -> Made:
        value = draw.choice(choices[split])
        return draw.choice(texts).format(value), {name: value, **more}

    return make


def _words(choices: Choices, name: str, most: int, *texts: str) -> Maker:
    def make(draw: Random, split: SplitName) -> Made:
        found = draw.sample(choices[split], draw.randint(1, most))
        return draw.choice(texts).format(", ".join(f'"{word}"' for word in found)), {name: found}

    return make


def _length(draw: Random, split: SplitName) -> Made:
    if draw.random() < 0.5:
        count = draw.choice(MOST_WORDS[split])
        text = draw.choice(
            ("Use less than {} words.", "Keep it under {} words.", "Your answer must have less than {} words.")
        )
        return text.format(count), {"num_words": count, "relation": "less than"}
    count = draw.choice(LEAST_WORDS[split])
    text = draw.choice(
        ("Use at least {} words.", "Write {} words or more.", "Your answer must have at least {} words.")
    )
    return text.format(count), {"num_words": count, "relation": "at least"}


def _letters(draw: Random, split: SplitName) -> Made:
    letter, count = draw.choice(SOME_LETTERS[split]), draw.choice(LETTER_COUNTS[split])
    args = {"letter": letter, "let_frequency": count, "let_relation": "at least"}
    return f'The letter "{letter}" must appear at least {count} times.', args


def _frequency(draw: Random, split: SplitName) -> Made:
    word, count = draw.choice(WANTED[split]), draw.choice(HELD_OUT_COUNTS)
    return f'Use the word "{word}" at least {count} times.', {
        "keyword": word,
        "frequency": count,
        "relation": "at least",
    }


def _counted(name: str, text: str) -> Maker:
    def make(draw: Random, split: SplitName) -> Made:
        count = draw.choice(HELD_OUT_COUNTS)
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
        ENDINGS,
        "end_phrase",
        'End with exactly this sentence: "{}"',
        'The last sentence must be "{}"',
        'Finish with the words "{}"',
    ),
    POSTSCRIPT: _one(MARKERS, "postscript_marker", "At the end, add a postscript that starts with {}"),
    LENGTH: _length,
    SENTENCES: _one(
        SENTENCE_COUNTS, "num_sentences", "Write exactly {} sentences.", "Answer in {} sentences, no more and no less."
    ),
    BULLETS: _one(
        BULLET_COUNTS,
        "num_bullets",
        'Answer with exactly {} bullet points, each on a line that begins with "* ".',
        'Give {} bullet points. Begin each with "* ".',
    ),
    WITH_WORDS: _words(
        WANTED, "keywords", 2, "Use the words {}.", "Include the words {}.", "These words must appear: {}."
    ),
    WITHOUT_WORDS: _words(UNWANTED, "forbidden_words", 3, "Do not use the words {}.", "Avoid the words {}."),
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
