"""What training changed, as tables: a model before and after, on the requests that are held out and on IFEval's published prompts.

    python recipes/smollm2/compare.py BEFORE AFTER [AFTER ...] [--published FILE] [--rows DIR]

BEFORE and AFTER are model directories; several AFTER, of other seeds, are averaged. FILE has rows as IFEval publishes them
(https://github.com/google-research/google-research/tree/master/instruction_following_eval, or the hub's google/IFEval); those with
one instruction are asked. All answers are greedy. With --rows every answer is kept in DIR.
"""

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

from align.data.cards import load_card
from align.data.loader import load_split
from align.data.own import read_user_file
from align.data.types import Example
from align.evaluate.accuracy import evaluate
from align.evaluate.drift import drift
from align.evaluate.hooks import PolicyCheckpoint
from align.experience import encode_problems
from align.model.policy import load_tokenizer
from align.recipe import ModelOptions
from align.recipe.dtype import dtype_of_machine
from align.run.files import write_jsonl
from align.statistics import mean_interval
from align.tasks.instructions import SEEN
from align.tools.offline import running_fleet
from reward import Sample
from reward.instructions import check
from rollout import FleetOptions

OWN, PUBLISHED = 150, 160
"""So many of the held-out requests of the card are asked, and so many of the published prompts."""
NEW_TOKENS = {"own": 192, "published": 200}
SHOWN = 5
QUOTES = "\"'“”„«»‘’"
Row = Mapping[str, Any]


def main() -> None:
    options = arguments()
    asked = {"own": list(load_split(load_card("instructions"), "test").examples)[:OWN]}
    if options.published:
        one = [e for e in read_user_file(options.published) if len(e.metadata["instruction_id_list"]) == 1]
        asked["published"] = one[:PUBLISHED]
    found = [answers(options.before, asked), *(answers(model, asked, options.before) for model in options.after)]
    if options.rows:
        for name, model in zip(["before", *(f"after_{n}" for n in range(len(found) - 1))], found, strict=True):
            for part, rows in model.items():
                write_jsonl(options.rows / f"{name}_{part}.jsonl", rows)
    print("\n".join(table(found)))
    for part in asked:
        print("\n".join(pairs(part, found[0][part], found[1][part])))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", metavar="BEFORE")
    parser.add_argument("after", metavar="AFTER", nargs="+")
    parser.add_argument("--published", metavar="FILE", help="IFEval's rows")
    parser.add_argument("--rows", metavar="DIR", type=Path, help="where to keep every answer")
    return parser.parse_args()


def answers(
    path: str, asked: Mapping[str, Sequence[Example]], start: str | None = None
) -> dict[str, list[dict[str, Any]]]:
    """A row for every greedy answer of the model at `path`, with what is counted of it, by where it was asked; under "drift" how far it is from `start`, where that is given."""
    model = ModelOptions(path=path, dtype=dtype_of_machine()[0])
    tokenizer = load_tokenizer(path)
    rollout = FleetOptions(workers=1, threads=2, max_length=1024)
    found: dict[str, list[dict[str, Any]]] = {}
    with running_fleet(model, rollout, tokenizer) as fleet:
        fleet.wait_until_ready()
        for part, examples in asked.items():
            result = evaluate(
                *(fleet, tokenizer, encode_problems(tokenizer, examples), None),
                samples=0,
                max_new_tokens=NEW_TOKENS[part],
                longest=rollout.max_length - NEW_TOKENS[part],
                seed=0,
            )
            found[part] = [counted(row, example) for row, example in zip(result.rows, examples, strict=True)]
        if start is not None:
            moved = drift(PolicyCheckpoint(model, tokenizer, rollout.max_length, start), fleet)
            found["drift"] = [{"difference": moved.values["difference"]}]
    return found


def counted(row: Row, example: Example) -> dict[str, Any]:
    """The row of an answer, with what the tables count of it."""
    text = row["completion"].strip()
    judged = check(Sample(example.id, example.prompt_text, text, None, example.domain, metadata=example.metadata))
    return {
        **{name: row[name] for name in ("id", "prompt", "completion")},
        "kinds": list(judged.kinds),
        "follows": all(judged.met),
        "answers": all(judged.met) and not judged.degenerate,
        "right": judged.passes and row["finish_reason"] != "length",
        "trained": set(judged.kinds) <= set(SEEN),
        "degenerate": bool(judged.degenerate),
        "quoted": "startend:quotation" not in judged.kinds and bool(text) and (text[0] in QUOTES or text[-1] in QUOTES),
        "lines": "\n" in text,
        "words": len(re.findall(r"\S+", text)),
    }


def table(found: Sequence[Mapping[str, Sequence[Row]]]) -> Iterator[str]:
    """Markdown: a line for each measure, before and after, and the difference with its 95 % interval over requests."""
    yield "| greedy answers | before | after | difference (95 % interval) |\n|---|---|---|---|"
    by_kind = [("... of the kinds that are trained", True), ("... of other kinds", False)]
    every = [
        ("IFEval's published prompts with one instruction: followed", "published", "follows", by_kind),
        ("... followed by an answer that is not degenerate", "published", "answers", by_kind),
        ("... begin or end with a quotation mark that nobody asked for", "published", "quoted", []),
        ("... of more than one line", "published", "lines", []),
        ("... words an answer", "published", "words", []),
        ("held-out requests: right", "own", "right", by_kind),
        ("... degenerate", "own", "degenerate", []),
        ("... begin or end with a quotation mark that nobody asked for", "own", "quoted", []),
        ("... words an answer", "own", "words", []),
    ]
    for name, part, measure, kinds in every:
        for called, trained in [(name, None), *kinds]:
            models = [[row for row in model.get(part, ()) if trained in (None, row["trained"])] for model in found]
            if models[0]:
                yield line(called, measure, models)
    moved = fmean(model["drift"][0]["difference"] for model in found[1:])
    yield f"| drift on ordinary requests, nats a token | 0.00 | {moved:.2f} | |"


def line(name: str, measure: str, models: Sequence[Sequence[Row]]) -> str:
    """A measure of the same requests before (the first of the models) and after (the mean of the others)."""
    before, *after = [[float(row[measure]) for row in rows] for rows in models]
    mean = [fmean(values) for values in zip(*after, strict=True)]
    differences = [new - old for new, old in zip(mean, before, strict=True)]
    unit, form = (1, ".0f") if measure == "words" else (100, ".1f")
    shown = "" if unit == 1 else " %"
    interval = mean_interval(differences)
    limits = f" ({interval[0] * unit:+{form}} to {interval[1] * unit:+{form}})" if interval else ""
    change = f"{fmean(differences) * unit:+{form}}{limits}"
    return f"| {name} ({len(before)}) | {fmean(before) * unit:{form}}{shown} | {fmean(mean) * unit:{form}}{shown} | {change} |"


def pairs(part: str, before: Sequence[Row], after: Sequence[Row]) -> Iterator[str]:
    """Markdown: the answers to requests that a draw with the seed 0 chooses, not a person."""
    yield f"\n### Answers to {SHOWN} requests drawn at random ({part})\n"
    for place in Random(0).sample(range(len(before)), min(SHOWN, len(before))):
        yield f"**{' '.join(before[place]['prompt'].split())}**\n"
        for name, row in (("before", before[place]), ("after", after[place])):
            yield f"- {name} ({'follows' if row['follows'] else 'does not follow'}): {' '.join(row['completion'].split())}"
        yield ""


if __name__ == "__main__":
    main()
