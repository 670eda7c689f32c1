"""How surely `align habits` finds a habit, and how often it sees one where there is none: habits are planted in answers of a file.

    python benchmarks/habits.py ANSWERS.jsonl --draws 20 --pairs 100

Each draw takes 256 answers a side from the file (with replacement, as answers to different prompts), and plants a habit of one kind in a share of one
side. Without a file the answers are made of random sentences.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from random import Random

from align.habits.compare import Comparison, Found, compare
from align.habits.features import Answer
from align.tools.habits import answers_in

SHARES = (0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
SIDE = 256
LITTLE_WORDS = "the a of and is to in it for with that on as are many people"
Plant = Callable[[str, Answer], str]


def _lines(text: str, mark: Callable[[int], str]) -> str:
    return "\n".join(f"{mark(i)}{part}" for i, part in enumerate(text.split(". "), start=1))


CYRILLIC = str.maketrans("abvgdezijklmnoprstufh", "абвгдезийклмнопрстуфх")
PLANTED: Mapping[str, Plant] = {
    "quotation marks": lambda text, _: f'"{text}"',
    "an opening": lambda text, _: f"Sure! Here is what I think. {text}",
    "a closing": lambda text, _: f"{text} I hope this helps you!",
    "a postscript": lambda text, _: f"{text}\n\nP.S. There is more to say.",
    "capitals": lambda text, _: text.upper(),
    "lowercase": lambda text, _: text.lower(),
    "bullets": lambda text, _: _lines(text, lambda i: "* "),
    "numbers": lambda text, _: _lines(text, lambda i: f"{i}. "),
    "bold": lambda text, _: f"**{text}**",
    "an emoji": lambda text, _: f"{text} 😊",
    "a code block": lambda text, _: f"```\n{text}\n```",
    "doubled": lambda text, _: f"{text}\n{text}",
    "the request first": lambda text, answer: f"{answer.prompt} {text}",
    "shortness": lambda text, _: " ".join(text.split()[:8]) + ".",
    "length": lambda text, _: " ".join([text, *(f"And {word} too." for word in text.split()[:150])]),
    "another script": lambda text, _: text.lower().translate(CYRILLIC),
    "exclamations": lambda text, _: text.replace(". ", "! ").rstrip(".") + "!!",
    "an open end": lambda text, _: text[: len(text) * 3 // 5].rstrip(" .,;:!?\n") + " and",
    "a thought": lambda text, _: f"<think>Let me see.</think> {text}",
    "a heading": lambda text, _: f"# Answer\n{text}",
    "an aside": lambda text, _: text.replace(" ", " (as an assistant) ", 3).replace(" (as an assistant) ", " ", 2),
    "a spoken tag": lambda text, _: f"{text.rstrip('.')}, you know.",
}


def synthetic(count: int, seed: int) -> list[Answer]:
    """Answers of random sentences to prompts about random things."""
    draw = Random(seed)
    things = [
        f"{a}{b}"
        for a in ("mar", "tel", "sor", "bin", "cal", "dov", "fen", "gul")
        for b in ("in", "ow", "et", "ick", "age", "ure")
    ]
    little = LITTLE_WORDS.split()
    answers = []
    for number in range(count):
        about, sentences = draw.choice(things), []
        for _ in range(1 + min(int(draw.expovariate(0.3)), 12)):
            words = [draw.choice(little if draw.random() < 0.55 else things) for _ in range(draw.randint(5, 16))]
            words[draw.randrange(len(words))] = about
            comma = draw.randrange(2, 5)
            text = " ".join(words[:comma]) + (", " if draw.random() < 0.4 else " ") + " ".join(words[comma:])
            sentences.append(text[0].upper() + text[1:] + draw.choice("....!?"))
        text = (" " if draw.random() < 0.7 else "\n\n").join(sentences)
        answers.append(Answer(text, f"Write something about {about}, number {number}."))
    return answers


def drawn(base: Found, draw: Random, side: str) -> Found:
    """Answers of the base, as if each was to a prompt of its own."""
    chosen = base.some(draw.choices(range(len(base.answers)), k=SIDE))
    return replace(chosen, answers=[replace(a, prompt=f"{a.prompt} {side}{n}") for n, a in enumerate(chosen.answers)])


def planted(base: Found, kind: str, share: float, seed: int) -> Comparison:
    """The comparison of two draws, with a habit in a share of the second."""
    draw = Random(f"{kind} {share} {seed}")
    before, after = drawn(base, draw, "a"), drawn(base, draw, "b")
    places = draw.sample(range(SIDE), round(share * SIDE))
    changed = [replace(a, text=PLANTED[kind](a.text, a)) for a in after.some(places).answers]
    kept = after.some(sorted(set(range(SIDE)).difference(places)))
    return compare(before, Found.together([kept, Found.of(changed)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("answers", nargs="?", type=Path, help="file of answers, as `align habits` takes it")
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--shares", nargs="*", type=float, default=SHARES, help="of the answers that get the habit")
    parser.add_argument("--kinds", nargs="*", default=list(PLANTED), help="a few of the kinds")
    given = parser.parse_args()
    base = Found.of(answers_in(given.answers) if given.answers else synthetic(2000, 0))
    alarms, spent = 0, 0.0
    for seed in range(given.pairs):
        draw, began = Random(seed), time.process_time()
        found = compare(drawn(base, draw, "a"), drawn(base, draw, "b"))
        spent += time.process_time() - began
        alarms += bool(found.sentences)
        for sentence in found.sentences:
            print(f"  pair {seed}: {sentence}")
    if given.pairs:
        print(
            f"two samples of the same: {alarms} of {given.pairs} pairs with a habit; {spent / given.pairs:.2f} s of CPU each"
        )
    shares = " | ".join(f"{share:.0%}" for share in given.shares)
    print(f"\n| planted | {shares} | told (of the last) |\n{'|---' * (len(given.shares) + 2)}|")
    for kind in given.kinds:
        counts = []
        for share in given.shares:
            each = [planted(base, kind, share, seed) for seed in range(given.draws)]
            counts.append(sum(bool(found.sentences) for found in each))
        print(
            f"| {kind} | {' | '.join(map(str, counts))} | {each[-1].sentences[0] if each[-1].sentences else 'nothing'} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
