"""Demonstrations: short plain answers that have the form that is asked for, made of sentences that suit every topic."""

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from align.data import instruction_kinds as kinds
from reward import Sample
from reward.instructions import judge

ATTEMPTS = 30
# No comma, and none of the words that an instruction forbids; {} is the topic.
SENTENCES = [
    *(
        "There is more to learn about {} than you think.",
        "I could talk about {} for hours.",
        "Few subjects make me smile as {} do.",
    ),
    *("My uncle once told me a funny secret about {}.", "You never quite know what to expect from {}."),
    *("When I was small I drew pictures of {} on every wall.", "Ask an expert about {} and you will hear a long tale."),
    *(
        "Begin slowly and let {} surprise you.",
        "Some books about {} are worth more than gold.",
        "A calm mind helps with {}.",
    ),
    *(
        "We went to find out about {} and came back happy.",
        "Every village has its own way with {}.",
        "Look closely at {} and you see why.",
    ),
    *("The finest part of {} is how it changes with the years.", "Whoever takes up {} has a full life."),
    *("A whole day spent with {} goes by like an hour.", "I would tell anyone who asks to give {} a try."),
    *("What I know about {} I know from my grandmother.", "It takes practice and a bit of luck to understand {}."),
    *("Nobody in our street knew much about {} until last spring.", "Children ask clever questions about {}."),
    *("Bring warm clothes and a cup of tea if {} keep you busy.", "With {} you learn from what goes wrong."),
    *("For me {} will forever be a part of home.", "Once you have seen how it works you look at {} with new eyes."),
    *("Old songs about {} still make us dance.", "Give {} a chance and do not hurry."),
]

Instruction = tuple[str, Mapping[str, Any]]


def answer(topic: str, asked: Sequence[Instruction], sample: Sample, draw: Random) -> str | None:
    """An answer that the reward `instructions` passes, `sample` being one without its completion.

    None where `ATTEMPTS` drawn ones do not pass: a rare letter many times in two sentences, for one.
    """
    for _ in range(ATTEMPTS):
        text = _draft(topic, dict(asked), draw)
        if judge(Sample(**{**vars(sample), "completion": text})).passes:
            return text
    return None


def unaware_answer(topic: str, draw: Random) -> str:
    """An answer to the request alone, whatever form it is asked to have."""
    return " ".join(sentence.format(topic) for sentence in draw.sample(SENTENCES, draw.randint(2, 3)))


def _draft(topic: str, asked: Mapping[str, Mapping[str, Any]], draw: Random) -> str:
    count = draw.randint(1, 5)
    count = asked.get(kinds.SENTENCES, {}).get("num_sentences", count)
    count = asked.get(kinds.BULLETS, {}).get("num_bullets", count)
    pool = SENTENCES
    if kinds.LETTERS in asked:
        letter = asked[kinds.LETTERS]["letter"]
        pool = sorted(SENTENCES, key=lambda sentence: -sentence.lower().count(letter))[: count + 4]
    said = [sentence.format(topic) for sentence in draw.sample(pool, count)]
    if kinds.WITH_WORDS in asked:
        found = " and ".join(asked[kinds.WITH_WORDS]["keywords"])
        said[-1] = f"{said[-1][:-1]} and it makes me think of {found}."
    text = "\n".join(f"* {line}" for line in said) if kinds.BULLETS in asked else " ".join(said)
    if kinds.TITLE in asked:
        text = f"<<{topic[0].upper()}{topic[1:]}>>\n\n{text}"
    if kinds.ENDING in asked:
        text += ("\n" if kinds.BULLETS in asked else " ") + asked[kinds.ENDING]["end_phrase"]
    if kinds.POSTSCRIPT in asked:
        text += f"\n\n{asked[kinds.POSTSCRIPT]['postscript_marker']} {draw.choice(SENTENCES).format(topic)}"
    text = text.upper() if kinds.CAPITALS in asked else text.lower() if kinds.SMALL in asked else text
    return f'"{text}"' if kinds.QUOTED in asked else text
