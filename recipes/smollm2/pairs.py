"""Pairs for DPO, of a model's own words: an answer in the form that was asked for, and one that is not.

    python recipes/smollm2/pairs.py MODEL FILE

lets MODEL answer requests about the training topics of the card `instructions`, and writes FILE (JSONL, `prompt`, `chosen`, `rejected`), which
dpo.yaml reads. The chosen completion is what the model says to the plain request, edited by a program until the reward `instructions` passes it.
The rejected one is the same with an instruction left out, or with one that nobody gave; or what the model says to the whole prompt, where that
does not pass; or a few words of the chosen one and no more, or over and over; or one about another topic. As both are the model's own, it learns
the forms and when they are wanted, and little else. A FILE that has the same model's pairs, made by this very script, is kept.
"""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

from align.data.chat import answer_text
from align.data.types import Example
from align.errors import UserError
from align.experience import encode_problems
from align.model.policy import load_tokenizer
from align.recipe import ModelOptions, check_model_directory
from align.recipe.dtype import dtype_of_machine
from align.run.files import read_jsonl, write_jsonl
from align.tasks.instructions import APART, generate
from align.tools.offline import running_fleet
from reward import Sample
from reward.instructions import SENTENCES, check
from rollout import FleetOptions, SamplingOptions

REQUESTS_OF_A_TOPIC = 5
PLAIN_SHARE = 0.3
GREEDY_PROMPTS = 450
MAX_NEW_TOKENS = 160
TEMPERATURE = 0.7
ATTEMPTS = 8
PAIRS = 1400
WORDS_OF_AN_ANSWER = (40, 90)
MOST_CAPITALS = 320
"""Characters of an answer in capitals, which take twice as many tokens as others."""
SHARES = {
    "left out": 0.75,
    "unasked": 0.55,
    "quoted": 0.08,
    "own": 1.0,
    "loop": 0.1,
    "short": 0.08,
    "another topic": 0.07,
}
"""How many of the pairs of each kind are kept. Quotation marks are rejected where nobody asked for them as often as they are missed: one token decides on
them, and they become a habit before all others."""
WORDS_OF_A_LOOP = (1, 12)
CAPITALS, SMALL = "change_case:english_capital", "change_case:english_lowercase"
NO_COMMA, QUOTED, ENDING = "punctuation:no_comma", "startend:quotation", "startend:end_checker"
TITLE, POSTSCRIPT = "detectable_format:title", "detectable_content:postscript"
BULLETS, WORDS = "detectable_format:number_bullet_lists", "length_constraints:number_words"
WITHOUT_WORDS = "keywords:forbidden_words"
EDITED = {
    CAPITALS,
    SMALL,
    NO_COMMA,
    QUOTED,
    ENDING,
    TITLE,
    POSTSCRIPT,
    BULLETS,
    WORDS,
    SENTENCES,
    WITHOUT_WORDS,
}
_MARKS = re.compile(r"^\s*(?:[#>*•-]+|\d+[.)])\s+|\*+|__+|`+", re.MULTILINE)
_GAP = re.compile(r"((?<=\D[.!?])\s+|(?<=[.!?][\"')])\s+|\n+)")
Asked = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Request:
    """A prompt of the card: the request alone, its topic, and what it asks for beside, by kind."""

    example: Example
    plain: str
    topic: Sequence[str]
    asked: Asked

    @classmethod
    def of(cls, example: Example) -> "Request":
        instructions = example.metadata["instructions"]
        text = example.prompt_text
        plain = text[: text.index(instructions[0]["text"])].strip() if instructions else text
        return cls(example, plain, example.metadata["topic"], {one["kind"]: one["args"] for one in instructions})

    def judged(self, text: str) -> Any:
        """What the reward `instructions` finds of an answer."""
        e = self.example
        return check(Sample(e.id, e.prompt_text, text, None, e.domain, metadata=e.metadata))

    def asking(self, plain: str) -> "Request":
        """The same with another request about the topic."""
        text = self.example.prompt_text.replace(self.plain, plain)
        return replace(self, example=replace(self.example, messages=({"role": "user", "content": text},)), plain=plain)


def pairs(model: str, file: Path) -> str:
    """Sample, edit and write; returns a line on what is there. Raises UserError for a model that cannot be used."""
    options = ModelOptions(path=model, dtype=dtype_of_machine()[0])
    check_model_directory(Path(model), options)
    source = {"model": model, "made_by": sha256(Path(__file__).read_bytes()).hexdigest()}
    if file.exists() and {(row.get("model"), row.get("made_by")) for row in read_jsonl(file)} == {(*source.values(),)}:
        return f"pairs of {model}'s own words are in {file} already"
    requests = about_few_requests(map(Request.of, generate("train", seed=0, plain_share=PLAIN_SHARE)))
    plain = list(dict.fromkeys(request.plain for request in requests))
    whole = [request.example.prompt_text for request in requests[:GREEDY_PROMPTS]]
    print(f"{model} answers {len(plain)} requests and {len(whole)} prompts: minutes on two cores", file=sys.stderr)
    said, greedy = answers(options, {TEMPERATURE: plain, 0.0: whole})
    rows: list[dict[str, Any]] = []
    for place, request in enumerate(requests):
        other = requests[(place + 1) % len(requests)]
        for kind, chosen, rejected in pairs_of(request, other, said, greedy.get(request.example.prompt_text)):
            if Random(f"{request.example.id}:{kind}").random() < SHARES[kind]:
                prompt = request.example.prompt_text
                rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "kind": kind, **source})
    if not rows:
        raise UserError(f"none of the answers of {model} could be edited into a pair: is it a chat model?")
    Random(0).shuffle(rows)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(file, rows[:PAIRS])
    return f"{len(rows[:PAIRS])} pairs of {model}'s own words are in {file}"


def about_few_requests(requests: Iterator[Request]) -> list[Request]:
    """The requests with the first few about each topic in the place of all others: one answer serves many instructions. None comes twice."""
    few: dict[str, dict[str, None]] = {}
    found: dict[str, Request] = {}
    everything = list(requests)
    for request in everything:
        of_topic = few.setdefault(" ".join(request.topic), {})
        if len(of_topic) < REQUESTS_OF_A_TOPIC:
            of_topic[request.plain] = None
    for request in everything:
        of_topic = few[" ".join(request.topic)]
        chosen = Random(request.example.id).choice(list(of_topic))
        changed = request if request.plain in of_topic else request.asking(chosen)
        found.setdefault(changed.example.prompt_text, changed)
    return list(found.values())


def answers(model: ModelOptions, asked: Mapping[float, Sequence[str]]) -> list[dict[str, str]]:
    """What the model says to each prompt, at each temperature."""
    tokenizer = load_tokenizer(model.path)
    rollout = FleetOptions(workers=1, threads=2, max_length=320, kv_cache_gb=1.0, batch_sequences=256)
    found = []
    with running_fleet(model, rollout, tokenizer) as fleet:
        fleet.wait_until_ready()
        for temperature, prompts in asked.items():
            examples = {
                f"pairs/{n}": Example(f"pairs/{n}", ({"role": "user", "content": text},), None, None, "instructions")
                for n, text in enumerate(prompts)
            }
            encoded = [problem.prompt for problem in encode_problems(tokenizer, list(examples.values()))]
            sampling = SamplingOptions(temperature=temperature, max_new_tokens=MAX_NEW_TOKENS)
            said = {}
            for group in fleet.sample(encoded, 1, sampling, seed=0, step=0):
                example = examples[group.prompt.id]
                tokens = group.trajectories[0].token_ids
                said[example.prompt_text] = answer_text(tokenizer, example.messages, tokens)
            found.append(said)
    return found


def pairs_of(
    request: Request, other: Request, said: Mapping[str, str], own: str | None
) -> Iterator[tuple[str, str, str]]:
    """Kind, chosen and rejected completion of each pair that can be made for a request; `own` is the model's answer to the whole prompt."""
    name = request.example.id
    found = None
    for seed in (f"{name}:{n}" for n in range(ATTEMPTS)):
        found = edited(said[request.plain], request.topic, request.asked, seed)
        if found is not None and request.judged(found).passes:
            break
    else:
        return
    chosen = found
    draw = Random(name)

    def otherwise(asked: Asked) -> Iterator[str]:
        text = edited(said[request.plain], request.topic, asked, seed)
        if text and text != chosen:
            yield text

    if left := sorted(EDITED & request.asked.keys()):
        gone = draw.choice(left)
        for text in otherwise({kind: args for kind, args in request.asked.items() if kind != gone}):
            if not request.judged(text).passes:
                yield "left out", chosen, text
    unasked = sorted(kind for kind in EDITED & other.asked.keys() if fits(kind, request.asked))
    for kind in draw.sample(unasked, min(1, len(unasked))):
        for text in otherwise({**request.asked, kind: other.asked[kind]}):
            yield "unasked", chosen, text
    if fits(QUOTED, request.asked):
        for text in otherwise({**request.asked, QUOTED: {}}):
            yield "quoted", chosen, text
    if own is not None and own.strip() and not request.judged(own.strip()).passes:
        yield "own", chosen, own.strip()
    loop = looped(chosen, draw)
    if not request.judged(loop).passes:
        yield "loop", chosen, loop
    start = " ".join(chosen.split()[: draw.randint(1, 10)])
    if not request.judged(start).passes:
        yield "short", chosen, start
    elsewhere = edited(said[other.plain], other.topic, request.asked, seed)
    if elsewhere and other.topic != request.topic:
        yield "another topic", chosen, elsewhere


def looped(text: str, draw: Random) -> str:
    """The beginning of a text whose last words come five times more at least, and until it is as long as the longest answers."""
    words = text.split(" ")
    end = draw.randint(1, len(words))
    again = words[max(0, end - draw.randint(*WORDS_OF_A_LOOP)) : end]
    times = max(max(WORDS_OF_AN_ANSWER) - end, 0) // len(again)
    return " ".join(words[:end] + again * max(times, 5))


def fits(kind: str, asked: Asked) -> bool:
    """Whether a request that asks for these could ask for one more kind."""
    return kind not in asked and not any(kind in apart and apart & asked.keys() for apart in APART)


def edited(said: str, topic: Sequence[str], asked: Asked, seed: str) -> str | None:
    """What was `said` in the form that was asked for, made of its sentences, and of their lines where it can be; None where that is too long."""
    draw = Random(seed)
    pieces = whole_pieces(said)
    unwanted = asked.get(WITHOUT_WORDS, {}).get("forbidden_words", [])
    pieces = [one for one in pieces if not any(re.search(rf"\b{word}\b", one, re.IGNORECASE) for word in unwanted)]
    count = asked.get(SENTENCES, {}).get("num_sentences") or asked.get(BULLETS, {}).get("num_bullets")
    if count:
        pieces = [" ".join(_MARKS.sub("", one).split()) + " " for one in pieces][:count]
    if asked.get(WORDS, {}).get("relation") == "less than":
        pieces = shortened(pieces, int(asked[WORDS]["num_words"] * draw.uniform(0.6, 1)))
    pieces = shortened(pieces, draw.randint(20, 55) if CAPITALS in asked else draw.randint(*WORDS_OF_AN_ANSWER))
    text = "\n".join(f"* {one.strip()}" for one in pieces) if BULLETS in asked else "".join(pieces).strip()
    if TITLE in asked:
        name = " ".join(topic)
        titles = (f"About {name}", name.title(), f"{name.capitalize()} for everybody", f"Thoughts on {name}")
        text = f"<<{draw.choice(titles)}>>\n\n{text}"
    if ENDING in asked:
        text += ("\n" if BULLETS in asked else draw.choice((" ", "\n\n"))) + asked[ENDING]["end_phrase"]
    if POSTSCRIPT in asked:
        last = whole_pieces(said)[-1:] or [""]
        marked = f"{asked[POSTSCRIPT]['postscript_marker']} {_MARKS.sub('', last[0]).strip()}"
        text = f"{text.removesuffix(last[0].strip()).strip()}\n\n{marked}"
    if NO_COMMA in asked:
        text = text.replace(",", "")
    text = text.upper() if CAPITALS in asked else text.lower() if SMALL in asked else text
    if CAPITALS in asked and len(text) > MOST_CAPITALS:
        return None
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
        print(pairs(sys.argv[1], Path(sys.argv[2])), file=sys.stderr)
    except UserError as error:
        sys.exit(f"error: {error}")
