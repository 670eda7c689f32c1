"""Which samples of a run go into its page, and their tokens as text. What is left out is counted."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from align.report.escape import for_script
from align.report.read import RunRecord, Stage, finite, read_table

TRAINING_SAMPLES = 2_000
EVALUATION_SAMPLES = 1_000
BYTES_OF_SAMPLES = 5_000_000
CHARACTERS_OF_A_TEXT = 20_000
TOKENS_OF_A_SAMPLE = 6_000
GOLDEN = 0.6180339887498949
REPLACEMENT = "\ufffd"
LONGEST_CHARACTER = 8
COLUMNS = (
    "id",
    "domain",
    "index",
    "prompt",
    "completion",
    "answer",
    "reward",
    "verdict",
    "components",
    "detail",
    "finish_reason",
    "tokens",
    "advantage",
    "trained_on",
    "greedy",
    "token_ids",
    "sampler_log_probs",
)

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Source:
    """A table of samples: `rows` are the first of them in the order in which they deserve to be shown."""

    stage: Stage
    step: int | None
    evaluation: str | None
    total: int
    rows: Sequence[Row]


class Decoder:
    """Token ids as text, one by one, by the tokenizer.json of a model directory."""

    def __init__(self, file: Path) -> None:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(file))
        self.special = {id_ for id_, token in tokenizer.get_added_tokens_decoder().items() if token.special}
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


def decoder_of(stage: Stage, run: RunRecord) -> Decoder | None:
    """The first tokenizer among the stage's model directories that can be loaded."""
    for directory in stage.model_directories(run.path):
        if (directory / "tokenizer.json").is_file():
            # The library raises bare Exception for a file that it cannot read.
            try:
                return Decoder(directory / "tokenizer.json")
            except Exception:
                continue
    return None


def as_data(run: RunRecord, limit: int = BYTES_OF_SAMPLES) -> dict[str, Any]:
    """The samples of the page's browser, in at most `limit` bytes of JSON.

    {"sources": [{stage, step, evaluation, total, shown}], "rows": [...], "texts": [...], "pieces": [...]}, where rows
    name texts (prompts, which a group shares) and pieces (texts of tokens) by their places in those lists.
    """
    training, evaluations = _training(run), _evaluations(run)
    decoders = {stage.label: decoder_of(stage, run) for stage in run.stages}
    share = 1.0
    while True:
        chosen = [*_within(training, TRAINING_SAMPLES * share), *_within(evaluations, EVALUATION_SAMPLES * share)]
        data = _pack(chosen, decoders)
        if not chosen or len(for_script(data).encode(errors="replace")) <= limit:
            return data | {"steps": sum(len(stage.samples) for stage in run.stages)}
        share /= 2


def by_interest(rows: Sequence[Row]) -> list[int]:
    """The places of training samples, masked, best, worst and ordinary ones in turn."""
    spread = sorted(range(len(rows)), key=lambda i: i * GOLDEN % 1)
    rewards = [finite(row.get("reward")) for row in rows]
    judged = [i for i in spread if rewards[i] is not None]
    masked = [i for i in spread if rewards[i] is None or row_masked(rows[i])]
    worst = sorted(judged, key=lambda i: rewards[i] or 0.0)
    best = sorted(judged, key=lambda i: -(rewards[i] or 0.0))
    turns = itertools.chain.from_iterable(itertools.zip_longest(masked, best, worst, spread))
    return list(dict.fromkeys(i for i in turns if i is not None))


def by_problem(rows: Sequence[Row]) -> list[int]:
    """The places of an evaluation's samples: those nobody could judge, then greedy ones, the same problems each time."""
    spread = sorted(range(len(rows)), key=lambda i: i * GOLDEN % 1)
    return sorted(spread, key=lambda i: (finite(rows[i].get("reward")) is not None, not rows[i].get("greedy")))


def row_masked(row: Row) -> bool:
    """Whether a training sample was left out of the update."""
    return row.get("trained_on") is False


def _training(run: RunRecord) -> list[Source]:
    files = [(stage, step, file) for stage in run.stages for step, file in stage.samples.items()]
    files = _evenly(files, TRAINING_SAMPLES)
    quota = TRAINING_SAMPLES // max(len(files), 1)
    return [Source(stage, step, None, *_read(file, by_interest, quota)) for stage, step, file in files]


def _evaluations(run: RunRecord) -> list[Source]:
    made = {}
    for stage in run.stages:
        for record in stage.evaluations:
            name, step = str(record.get("name")), record.get("step")
            file = stage.evaluation_file(name)
            if file is not None:
                made[file] = (stage, step if isinstance(step, int) else None, name)
    chosen = _evenly(list(made.items()), EVALUATION_SAMPLES)
    quota = EVALUATION_SAMPLES // max(len(chosen), 1)
    return [Source(stage, step, name, *_read(file, by_problem, quota)) for file, (stage, step, name) in chosen]


def _read(path: Path, order: Callable[[Sequence[Row]], list[int]], most: int) -> tuple[int, list[Row]]:
    """How many samples a table has, and the first `most` of them in this order."""
    table = read_table(path)
    table = table.select([name for name in COLUMNS if name in table.column_names])
    light = [name for name in ("reward", "trained_on", "greedy") if name in table.column_names]
    places = order(table.select(light).to_pylist()) if light else list(range(table.num_rows))
    return table.num_rows, table.take(places[:most]).to_pylist()


def _within(sources: Sequence[Source], most: float) -> Iterator[tuple[Source, Sequence[Row]]]:
    """At most `most` samples, as many of each source; of too many sources, evenly chosen ones."""
    chosen = _evenly(sources, int(most))
    for source in chosen:
        yield source, source.rows[: int(most) // len(chosen)]


def _evenly(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the items, the last always among them."""
    if len(items) <= most:
        return list(items)
    return [items[(i + 1) * len(items) // most - 1] for i in range(most)]


def _pack(chosen: Sequence[tuple[Source, Sequence[Row]]], decoders: Mapping[str, Decoder | None]) -> dict[str, Any]:
    texts, pieces = _Places(), _Places()
    packed = [
        _row(row, place, decoders.get(source.stage.label), texts, pieces)
        for place, (source, rows) in enumerate(chosen)
        for row in rows
    ]
    sources = [
        {
            "stage": source.stage.label,
            "step": source.step,
            "evaluation": source.evaluation,
            "total": source.total,
            "shown": len(rows),
        }
        for source, rows in chosen
    ]
    return {"sources": sources, "rows": packed, "texts": list(texts), "pieces": list(pieces)}


class _Places(dict[str, int]):
    """The texts met so far, each with its place."""

    def place(self, text: str) -> int:
        return self.setdefault(text, len(self))


def _row(row: Row, source: int, decoder: Decoder | None, texts: _Places, pieces: _Places) -> dict[str, Any]:
    completion = str(row.get("completion") or "")
    packed: dict[str, Any] = {
        "source": source,
        "prompt": texts.place(_cut(str(row.get("prompt") or ""))),
        "completion": _cut(completion),
        "masked": row_masked(row) or ("reward" in row and finite(row["reward"]) is None),
    }
    for name in ("id", "domain", "verdict", "detail", "answer", "finish_reason"):
        if row.get(name) not in (None, ""):
            packed[name] = _cut(str(row[name]))
    for name in ("index", "tokens", "reward", "advantage"):
        packed[name] = _short(row.get(name))
    components = row.get("components")
    if isinstance(components, dict):
        # A reward that does not apply to the sample's domain is a null column.
        packed["components"] = {name: _short(value) for name, value in components.items() if value is not None}
    if row.get("greedy"):
        packed["greedy"] = True
    return packed | _coloured(row, completion, decoder, pieces)


def _coloured(row: Row, completion: str, decoder: Decoder | None, pieces: _Places) -> dict[str, Any]:
    """The sample's tokens with their log-probabilities; nothing where their texts do not add up to the completion."""
    ids, log_probs = row.get("token_ids"), row.get("sampler_log_probs")
    if decoder is None or not ids or not log_probs or len(ids) != len(log_probs):
        return {}
    shown = ids[:TOKENS_OF_A_SAMPLE]
    found = decoder.pieces(shown)
    plain = "".join(piece for piece, id_ in zip(found, shown, strict=True) if id_ not in decoder.special)
    # The white space that a chat template puts before an answer is the model's to write and no part of the text.
    plain = plain if plain.startswith(completion[:1]) else plain.lstrip()
    if plain != completion and (len(shown) == len(ids) or not completion.startswith(plain.rstrip(REPLACEMENT))):
        return {}
    return {
        "pieces": [pieces.place(piece) for piece in found],
        "log_probs": [_short(value) for value in log_probs[: len(shown)]],
        "special": [i for i, id_ in enumerate(shown) if id_ in decoder.special],
        "mean_log_prob": _short(sum(log_probs) / len(log_probs)),
    }


def _cut(text: str) -> str:
    if len(text) <= CHARACTERS_OF_A_TEXT:
        return text
    return f"{text[:CHARACTERS_OF_A_TEXT]} […{len(text) - CHARACTERS_OF_A_TEXT} more characters]"


def _short(value: Any) -> float | None:
    found = value if isinstance(value, int) else finite(value)
    return None if found is None else round(found, 3)
