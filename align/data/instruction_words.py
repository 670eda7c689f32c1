"""The words that generated instructions are made of: topics, requests, and what the checks are asked for, split by split.

No topic and no parameter of an instruction is in two splits.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from align.data.types import SplitName

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
LETTERS: Choices = {"train": list("bdgmpwy"), "validation": list("k"), "test": list("cfhv")}
LETTER_COUNTS: Choices = {"train": [4, 6, 8], "validation": [9], "test": [5, 7]}
MOST_WORDS: Choices = {"train": [20, 30, 45, 60], "validation": [35], "test": [25, 40, 50]}
LEAST_WORDS: Choices = {"train": [20, 30, 45], "validation": [35], "test": [25, 40]}
SENTENCES: Choices = {"train": [2, 4], "validation": [6], "test": [3, 5]}
BULLETS: Choices = {"train": [2, 4], "validation": [6], "test": [3, 5]}
"""Only the test has the kinds that these are for."""
HELD_OUT_COUNTS = (2, 3)


def topics(split: SplitName) -> list[str]:
    """The topics of a split."""
    rows = [line.split("|") for line in TOPICS.split("\n") if line]
    return [topic for row in rows for topic, its in zip(row, SPLIT_OF_TEN, strict=True) if its == split]


def key_words(topic: str) -> list[str]:
    """The words of a topic of which an answer to it has one."""
    return [word for word in topic.split() if word not in FUNCTION_WORDS]
