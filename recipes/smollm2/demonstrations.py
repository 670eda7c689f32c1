"""Demonstrations for a first SFT: what the model itself says to plain requests, edited by a program until it follows instructions.

    python recipes/smollm2/demonstrations.py MODEL FILE

lets MODEL answer training requests of the card `instructions` with nothing said of the form, edits each answer into the form that was
asked for, and writes FILE (JSONL, `messages`), which sft.yaml reads. The words stay the model's own, so that it learns the form and
little else. An answer that the reward `instructions` does not pass once it was edited is left out. A FILE that has the same model's
demonstrations is left as it is.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from align.data.types import Example
from align.errors import UserError
from align.recipe import ModelOptions, check_model_directory
from align.recipe.dtype import dtype_of_machine
from align.run.files import read_jsonl, write_jsonl
from align.tasks.instructions import generate
from align.tools.offline import answers_of
from reward import Sample
from reward.instructions import SENTENCES, check
from rollout import FleetOptions

EXAMPLES = 900
PLAIN_SHARE = 0.25
MAX_NEW_TOKENS = 176
TEMPERATURE = 0.7
ATTEMPTS = 20
MOST_CAPITALS = 320
"""Characters of a demonstration in capitals, which take twice as many tokens as others."""
CAPITALS, SMALL = "change_case:english_capital", "change_case:english_lowercase"
NO_COMMA, QUOTED, ENDING = "punctuation:no_comma", "startend:quotation", "startend:end_checker"
TITLE, POSTSCRIPT = "detectable_format:title", "detectable_content:postscript"
BULLETS, WORDS = "detectable_format:number_bullet_lists", "length_constraints:number_words"
WITH_WORDS, WITHOUT_WORDS = "keywords:existence", "keywords:forbidden_words"
_MARKS = re.compile(r"^\s*(?:[#>*•-]+|\d+[.)])\s+|\*+|__+|`+", re.MULTILINE)
_GAP = re.compile(r"((?<=\D[.!?])\s+|(?<=[.!?][\"')])\s+|\n+)")
_WITH_WORDS = (
    "It also makes me think of {}.",
    "There is a little of {} in it.",
    "Think of {} as well.",
    "Here belongs what one calls {} too.",
)


def demonstrations(model: str, file: Path) -> str:
    """Sample, edit and write; returns a line on what is there. Raises UserError for a model that cannot be used."""
    options = ModelOptions(path=model, dtype=dtype_of_machine()[0])
    check_model_directory(Path(model), options)
    if file.exists() and {row.get("model") for row in read_jsonl(file)} == {model}:
        return f"demonstrations of {model}'s own words are in {file} already"
    examples = generate("train", seed=0, plain_share=PLAIN_SHARE)[:EXAMPLES]
    requests = list(dict.fromkeys(example.metadata["request"] for example in examples))
    print(f"{model} answers {len(requests)} plain requests: some minutes on two cores", file=sys.stderr)
    rollout = FleetOptions(workers=1, threads=2, max_length=256)
    texts = answers_of(options, requests, rollout, max_new_tokens=MAX_NEW_TOKENS, temperature=TEMPERATURE)
    made = [(example, demonstration(example, texts[example.metadata["request"]])) for example in examples]
    rows = [
        {"model": model, "messages": [*example.messages, {"role": "assistant", "content": text}]}
        for example, text in made
        if text is not None
    ]
    if not rows:
        raise UserError(f"none of the {len(made)} answers of {model} could be edited into a demonstration: is it a chat model?")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(file, rows)
    return f"{len(rows)} demonstrations of {model}'s own words are in {file}; {len(made) - len(rows)} answers could not be edited into one"


def demonstration(example: Example, said: str) -> str | None:
    """What was `said` to the request alone, edited into an answer that the reward `instructions` passes; None where no draft passes."""
    asked = {one["kind"]: one["args"] for one in example.metadata["instructions"]}
    for attempt in range(ATTEMPTS):
        text = edited(said, example.metadata["topic"], asked, Random(f"{example.id}:{attempt}"))
        sample = Sample(example.id, example.prompt_text, text, None, example.domain, metadata=example.metadata)
        if (len(text) <= MOST_CAPITALS or not text.isupper()) and check(sample).passes:
            return text
    return None


def edited(said: str, topic: Sequence[str], asked: Mapping[str, Mapping[str, Any]], draw: Random) -> str:
    """A draft of an answer in the form that was asked for, made of the sentences that were `said`, and of their lines where it can be."""
    pieces = whole_pieces(said)
    unwanted = asked.get(WITHOUT_WORDS, {}).get("forbidden_words", [])
    pieces = [one for one in pieces if not any(re.search(rf"\b{word}\b", one, re.IGNORECASE) for word in unwanted)]
    if (found := asked.get(WITH_WORDS, {}).get("keywords")) and pieces:
        pieces.insert(draw.randint(1, min(3, len(pieces))), draw.choice(_WITH_WORDS).format(" and ".join(found)) + " ")
    count = asked.get(SENTENCES, {}).get("num_sentences") or asked.get(BULLETS, {}).get("num_bullets")
    if count:
        pieces = [" ".join(_MARKS.sub("", one).split()) + " " for one in pieces][:count]
    if asked.get(WORDS, {}).get("relation") == "less than":
        pieces = shortened(pieces, int(asked[WORDS]["num_words"] * draw.uniform(0.6, 1)))
    if CAPITALS in asked:
        pieces = shortened(pieces, draw.randint(20, 55))
    text = "\n".join(f"* {one.strip()}" for one in pieces) if BULLETS in asked else "".join(pieces).strip()
    if TITLE in asked:
        name = " ".join(topic)
        text = f"<<{draw.choice((f'About {name}', name.title(), f'{name.capitalize()} for everybody', f'Thoughts on {name}'))}>>\n\n{text}"
    if ENDING in asked:
        text += ("\n" if BULLETS in asked else draw.choice((" ", "\n\n"))) + asked[ENDING]["end_phrase"]
    if POSTSCRIPT in asked:
        last = whole_pieces(said)[-1:] or [""]
        text = f"{text.removesuffix(last[0].strip()).strip()}\n\n{asked[POSTSCRIPT]['postscript_marker']} {_MARKS.sub('', last[0]).strip()}"
    if NO_COMMA in asked:
        text = text.replace(",", "")
    text = text.upper() if CAPITALS in asked else text.lower() if SMALL in asked else text
    return '"' + text.replace('"', "'") + '"' if QUOTED in asked else text


def whole_pieces(text: str) -> list[str]:
    """The sentences and headings of a text, each with the white space after it and each once, up to the last sentence that ends."""
    parts = _GAP.split(text.strip())
    pieces = [sentence + gap for sentence, gap in zip(parts[::2], [*parts[1::2], ""], strict=True)]
    while pieces and not re.search(r"[^\W\d].*[.!?][\"')]*\s*$", pieces[-1]):
        pieces.pop()
    once = {piece.strip().lower(): piece for piece in reversed(pieces)}
    return [piece for piece in pieces if once.pop(piece.strip().lower(), None) is not None]


def shortened(pieces: Sequence[str], words: int) -> list[str]:
    """As many of the first pieces as have so many words."""
    kept: list[str] = []
    for piece in pieces:
        if len(" ".join([*kept, piece]).split()) >= words:
            break
        kept.append(piece)
    return kept


if __name__ == "__main__":
    try:
        print(demonstrations(sys.argv[1], Path(sys.argv[2])), file=sys.stderr)
    except UserError as error:
        sys.exit(f"error: {error}")
