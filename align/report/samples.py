"""Which samples of a run go into its page: the conversation of each, and its tokens. Whatever is left out is counted."""

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from jinja2.utils import htmlsafe_json_dumps

from align.report.read import Record, RunRecord, Stage, at, finite, read_table
from reward import Verdict

TRAINING_SAMPLES = 2_000
EVALUATION_SAMPLES = 1_000
BYTES_OF_SAMPLES = 5_000_000
SAMPLES_OF_A_PART = 200
BYTES_OF_A_PART = 2_000_000
BYTES_OF_A_TOKEN = 20
CHARACTERS_OF_A_TEXT = 20_000
TOKENS_OF_A_SAMPLE = 6_000
GOLDEN = 0.6180339887498949
REPLACEMENT = "\ufffd"
LONGEST_CHARACTER = 8
TEXTS = ("id", "domain", "verdict", "detail", "ground_truth", "finish_reason")
NUMBERS = ("index", "tokens", "reward", "advantage")
PER_TOKEN = ("token_ids", "log_probs", "learner_log_probs", "sampled", "weight_versions", "weight_version", "turns")
OTHERS = ("prompt", "metadata", "completion", "components", "trained_on", "greedy", *PER_TOKEN)
THOUGHT = ("<think>", "</think>")
EMPTY_THOUGHT = re.compile(r"\s*<think>\s*</think>")
JSON_STYLE: dict[str, Any] = {"ensure_ascii": False, "allow_nan": False, "separators": (",", ":")}


@dataclass(frozen=True, slots=True)
class Source:
    """A file of samples, of a step or of an evaluation: `total` rows, of which `rows` are to be shown, in this order."""

    stage: Stage
    step: int | None
    evaluation: str | None
    file: Path
    total: int = 0
    rows: Sequence[Record] = ()

    @property
    def named(self) -> dict[str, Any]:
        """What the page calls it."""
        return {"stage": self.stage.label, "step": self.step, "evaluation": self.evaluation}


class Decoder:
    """The text of single tokens, by the tokenizer.json of a model directory."""

    def __init__(self, file: Path) -> None:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(file))
        added = tokenizer.get_added_tokens_decoder()
        self.special = {id_ for id_, token in added.items() if token.special and token.content not in THOUGHT}
        self._decode: Callable[[tuple[int, ...]], str] = lru_cache(maxsize=200_000)(
            lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=False))
        )

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each token; one that ends inside a character is "", and the next has the whole character."""
        found: list[str] = []
        context: tuple[int, ...] = ()
        held: tuple[int, ...] = ()
        for position, id_ in enumerate(ids, start=1):
            held = (*held, id_)
            text = self._decode(context + held)[len(self._decode(context)) :]
            whole = not text.endswith(REPLACEMENT) or len(held) == LONGEST_CHARACTER or position == len(ids)
            found.append(text if whole else "")
            if whole:
                context, held = held, ()
        return found


def sources(run: RunRecord) -> list[Source]:
    """The files of samples of a run: those of its steps, stage by stage, and then those of its evaluations that have answers."""
    steps = [Source(stage, step, None, file) for stage in run.stages for step, file in stage.samples.items()]
    evaluations = {
        file: Source(stage, step if isinstance(step := record.get("step"), int) else None, name, file)
        for stage in run.stages
        for record in stage.evaluations
        if (file := stage.evaluation_file(name := str(record.get("name")))) is not None and _has_answers(file)
    }
    return [*steps, *evaluations.values()]


def _has_answers(file: Path) -> bool:
    """Whether a table is of answers; pairs that a reward model told apart, or texts that a hook measured, are not."""
    try:
        return "completion" in pq.read_schema(file).names
    except (OSError, pa.ArrowException):
        return True  # what is wrong with it is told where it is read


def part_as_data(run: RunRecord, source: Source, start: int = 0, limit: int = BYTES_OF_A_PART) -> dict[str, Any]:
    """Some samples of one file for the page's browser, from place `start` of those most worth a look, as `as_data` has them.

    As many as have room in `limit` bytes of JSON, but at least one where there are more; "start" is in the result too.
    """
    order = by_interest if source.evaluation is None else by_problem
    read = _read_one(source, order, slice(start, start + SAMPLES_OF_A_PART))
    decoders = {source.stage.label: _decoder(source.stage, run)}
    tokens = itertools.accumulate(row.get("tokens") or 0 for row in read.rows)
    count = sum(total * BYTES_OF_A_TOKEN <= limit for total in tokens)
    while True:
        data = _pack([replace(read, rows=read.rows[: max(count, 1)])], decoders)
        if count <= 1 or len(to_json(data).encode(errors="replace")) <= limit:
            return data | {"start": start}
        count //= 2


def as_data(run: RunRecord, limit: int = BYTES_OF_SAMPLES) -> dict[str, Any]:
    """The samples of the page's browser, in at most `limit` bytes of JSON.

    {"sources": [{stage, step, evaluation, total, shown}], "rows": [...], "prompts": [...], "pieces": [...]}, where rows
    refer to prompts (conversations, which a group shares) and pieces (texts of tokens) by their places in those lists;
    "steps" counts the files of training samples, "uncoloured" the training samples shown without their tokens.
    """
    found = sources(run)
    steps = [source for source in found if source.evaluation is None]
    training = _read(steps, TRAINING_SAMPLES, by_interest)
    held_out = _read([source for source in found if source.evaluation is not None], EVALUATION_SAMPLES, by_problem)
    decoders = {stage.label: _decoder(stage, run) for stage in run.stages}
    share = 1.0
    while True:
        shown = [*_first(training, int(TRAINING_SAMPLES * share)), *_first(held_out, int(EVALUATION_SAMPLES * share))]
        data = _pack(shown, decoders)
        if not shown or len(to_json(data).encode(errors="replace")) <= limit:
            return data | {"steps": len(steps)}
        share /= 2


def to_json(data: Any) -> str:
    """`data` as JSON that is safe inside a <script> element."""
    return htmlsafe_json_dumps(data, **JSON_STYLE)


def by_interest(rows: Sequence[Record]) -> list[int]:
    """The places of training samples, masked, best, worst and ordinary ones in turn."""
    spread = _spread(len(rows))
    rewards = [finite(row.get("reward")) for row in rows]
    judged = [i for i in spread if rewards[i] is not None]
    masked = [i for i in spread if rewards[i] is None or _masked(rows[i])]
    worst = sorted(judged, key=lambda i: rewards[i] or 0.0)
    best = sorted(judged, key=lambda i: -(rewards[i] or 0.0))
    turns = itertools.chain.from_iterable(itertools.zip_longest(masked, best, worst, spread))
    return list(dict.fromkeys(i for i in turns if i is not None))


def by_problem(rows: Sequence[Record]) -> list[int]:
    """The places of an evaluation's samples: unjudged ones, then greedy ones, of the same problems each time."""
    unjudged = [finite(row.get("reward")) is None for row in rows]
    return sorted(_spread(len(rows)), key=lambda i: (not unjudged[i], not rows[i].get("greedy")))


def _spread(count: int) -> list[int]:
    """0 to `count` - 1 in an order of which every beginning is spread evenly over the whole."""
    return sorted(range(count), key=lambda i: i * GOLDEN % 1)


def _masked(row: Record) -> bool:
    """Whether a training sample was excluded from the update."""
    return row.get("trained_on") is False


def _was_to_be_scored(row: Record) -> bool:
    return "reward" in row and row.get("verdict") != Verdict.UNSCORED


def _decoder(stage: Stage, run: RunRecord) -> Decoder | None:
    """A decoder by the first tokenizer among the stage's model directories that can be loaded."""
    for directory in stage.model_directories(run.path):
        if (directory / "tokenizer.json").is_file():
            # The library raises bare Exception for a file that it cannot read.
            try:
                return _decoder_of(directory / "tokenizer.json")
            except Exception:
                continue
    return None


_decoder_of = lru_cache(maxsize=8)(Decoder)


def _read(sources: Sequence[Source], most: int, order: Callable[[Sequence[Record]], list[int]]) -> list[Source]:
    """The sources with their first samples in this order, at most `most` in all."""
    chosen = _evenly(sources, most)
    return [_read_one(source, order, slice(most // len(chosen))) for source in chosen]


def _read_one(source: Source, order: Callable[[Sequence[Record]], list[int]], part: slice) -> Source:
    """The source with a part of its samples in this order."""
    table = read_table(source.file, (*TEXTS, *NUMBERS, *OTHERS))
    light = [name for name in ("reward", "trained_on", "greedy") if name in table.column_names]
    places = order(table.select(light).to_pylist()) if light else list(range(table.num_rows))
    # Arrow takes nothing by no places at all.
    rows = table.take(places[part]).to_pylist() if places[part] else []
    return replace(source, total=table.num_rows, rows=rows)


def _first(sources: Sequence[Source], most: int) -> list[Source]:
    """At most `most` samples, as many of each source; of too many sources, evenly chosen ones."""
    chosen = _evenly(sources, most)
    return [replace(source, rows=source.rows[: most // len(chosen)]) for source in chosen]


def _evenly(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the items, always with the last."""
    count = min(len(items), most)
    return [items[(i + 1) * len(items) // count - 1] for i in range(count)]


def _pack(sources: Sequence[Source], decoders: Mapping[str, Decoder | None]) -> dict[str, Any]:
    prompts, pieces = _Places(), _Places()
    rows, told, uncoloured = [], [], 0
    for place, source in enumerate(sources):
        told.append(source.named | {"total": source.total, "shown": len(source.rows)})
        for row in source.rows:
            tokens = _tokens(row, decoders[source.stage.label], pieces)
            uncoloured += source.evaluation is None and not tokens
            rows.append({"source": place, "prompt": prompts.place(json.dumps(_prompt(row)))} | _row(row) | tokens)
    conversations = [json.loads(prompt) for prompt in prompts]
    return {"sources": told, "rows": rows, "prompts": conversations, "pieces": list(pieces), "uncoloured": uncoloured}


class _Places(dict[str, int]):
    """The texts met so far, each with its place."""

    def place(self, text: str) -> int:
        return self.setdefault(text, len(self))


def _row(row: Record) -> dict[str, Any]:
    packed: dict[str, Any] = {
        "completion": _cut(row.get("completion")),
        "masked": _masked(row) or (_was_to_be_scored(row) and finite(row["reward"]) is None),
    }
    packed |= {name: _cut(row[name]) for name in TEXTS if row.get(name) not in (None, "")}
    packed |= {name: _short(row.get(name)) for name in NUMBERS}
    if isinstance(components := row.get("components"), dict):
        # A reward that does not apply to the sample's domain is a null column.
        packed["components"] = {name: _short(value) for name, value in components.items() if value is not None}
    return packed | ({} if row.get("greedy") is None else {"greedy": bool(row["greedy"])})


def _prompt(row: Record) -> list[dict[str, Any]]:
    """The conversation that was answered: {role, content} of each message, with the name and the calls of those that have some."""
    try:
        messages = json.loads(row.get("metadata") or "{}").get("messages")
    except (ValueError, TypeError, AttributeError):
        messages = None
    if not (isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages)):
        return [{"role": "user", "content": _cut(row.get("prompt"))}]
    return [_message(message) for message in messages]


def _message(message: Record) -> dict[str, Any]:
    found = {"role": str(message.get("role")), "content": _cut(message.get("content"))}
    if name := message.get("name"):
        found["name"] = str(name)
    calls = message.get("tool_calls")
    return found | ({"calls": [_call(call) for call in calls]} if isinstance(calls, list) and calls else {})


def _call(call: Any) -> str:
    """A call of a tool as one writes it: `name(arguments)`."""
    function = at(call, "function") or call
    name, arguments = at(function, "name"), at(function, "arguments")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return _cut(f"{name}({text})")


def _tokens(row: Record, decoder: Decoder | None, pieces: _Places) -> dict[str, Any]:
    """The sample's tokens and what is known of each; nothing where their texts do not add up to the completion.

    Tokens that an environment or a template wrote (`sampled` is false) are listed as given, and have no numbers.
    "differences" are those of the learner's log-probabilities to the sampler's; "versions" and "turns" are
    [start, version] and [start, end], as in the trajectory.
    """
    ids, log_probs, learned = row.get("token_ids"), row.get("log_probs"), row.get("learner_log_probs")
    sampled = row.get("sampled") or [True] * len(ids or ())
    if decoder is None or not ids or not log_probs or not len(ids) == len(log_probs) == len(sampled):
        return {}
    turns = [[turn["start"], turn["end"]] for turn in row.get("turns") or ()] or [[0, len(ids)]]
    shown = ids[:TOKENS_OF_A_SAMPLE]
    found = decoder.pieces(shown)
    said = "".join(piece for piece, id_ in zip(found, shown, strict=True) if id_ not in decoder.special)
    if not _adds_up(said, str(row.get("completion") or ""), cut=len(shown) < len(ids), several=len(turns) > 1):
        return {}
    drawn = [value for value, own in zip(log_probs, sampled, strict=True) if own]
    versions = [[run["start"], run["version"]] for run in row.get("weight_versions") or ()]
    if not versions and row.get("weight_version") is not None:
        versions = [[0, row["weight_version"]]]
    tokens = {
        "pieces": [pieces.place(piece) for piece in found],
        "log_probs": [_short(value) for value in log_probs[: len(shown)]],
        "special": [i for i, id_ in enumerate(shown) if id_ in decoder.special],
        "given": [i for i in range(len(shown)) if not sampled[i]],
        "mean_log_prob": _short(sum(drawn) / len(drawn)) if drawn else None,
        "versions": versions,
        "turns": turns,
    }
    if learned and len(learned) == len(ids):
        known = zip(learned, log_probs, sampled, strict=True)
        tokens["differences"] = [
            _short(mine - theirs, 4) if own and None not in (mine, theirs) else None
            for mine, theirs, own in itertools.islice(known, len(shown))
        ]
    return tokens


def _adds_up(said: str, completion: str, *, cut: bool, several: bool) -> bool:
    """Whether a completion is what its tokens say, as far as these are shown.

    The white space and the empty thought that a template puts before an answer are the model's to write and no part of the
    completion, and a thought that the prompt opens is part of the completion and not of the tokens. Of several turns, a
    completion has the last.
    """
    text, wanted = said.strip(), completion.strip()
    if several:
        return cut or wanted in text
    opened, bare = wanted.removeprefix(THOUGHT[0]).lstrip(), EMPTY_THOUGHT.sub("", text, count=1).strip()
    return any(
        mine == theirs or (cut and theirs.startswith(mine.rstrip(REPLACEMENT)))
        for mine, theirs in ((text, wanted), (bare, wanted), (text, opened))
    )


def _cut(value: object) -> str:
    text = "" if value is None else str(value)
    more = len(text) - CHARACTERS_OF_A_TEXT
    return text if more <= 0 else f"{text[:CHARACTERS_OF_A_TEXT]} […{more} more characters]"


def _short(value: Any, digits: int = 3) -> float | None:
    found = value if isinstance(value, int) else finite(value)
    return None if found is None else round(found, digits)
