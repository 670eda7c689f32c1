"""A user's own file of completions, scored by a registered reward."""

import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.errors import UserError
from align.run import write_jsonl
from align.run.files import read_jsonl_lines
from reward import Mixture, RewardError, RewardTerm, Sample

EXAMPLE = '{"id": "1", "completion": "It is \\\\boxed{4}.", "ground_truth": "4"}'


def score_file(term: RewardTerm, data: Path, out: Path) -> str:
    """Score every line of `data` and write id, value, verdict, detail and seconds of each to `out`; returns a summary.

    A line has `id` and `completion`, or `key` (which may be a number) and `response` as IFEval publishes them; it may have `prompt`,
    `ground_truth` (`answer` in older files) and `domain`, and everything else, such as `tests`, goes to the reward as metadata. A sample that nobody could judge has the value null. Raises UserError with file and line.
    """
    if out.exists():
        raise UserError(f"--out {out} exists already; give another file, or take it away")
    samples = [_sample(row, f"{data}, line {line}") for line, row in read_jsonl_lines(data)]
    if not samples:
        raise UserError(f"{data} is empty: each line must be like {EXAMPLE}")
    try:
        rewards = Mixture([term], infra_error_limit=1.0).score(samples)
    except RewardError as error:
        raise UserError(str(error)) from None
    scores = [reward.components[term.component] for reward in rewards]
    write_jsonl(
        out,
        [
            {"id": s.id, "value": r.value, "verdict": str(c.verdict), "detail": c.detail, "seconds": c.seconds}
            for s, r, c in zip(samples, rewards, scores, strict=True)
        ],
    )
    judged = [reward.value for reward in rewards if reward.value is not None]
    mean = f"mean value {sum(judged) / len(judged):.3f}" if judged else "none could be judged"
    verdicts = ", ".join(f"{count} {name}" for name, count in sorted(Counter(str(c.verdict) for c in scores).items()))
    return f"{len(samples)} completions, {mean} ({verdicts}); scores are in {out}"


def _sample(row: Mapping[str, Any], where: str) -> Sample:
    if "id" not in row and "key" in row:
        row = {**row, "id": str(row["key"])}
    if "completion" not in row and "response" in row:
        row = {**row, "completion": row["response"]}
    if "answer" in row:
        warnings.warn("the key answer of a completion is ground_truth now", FutureWarning, stacklevel=2)
    truth = (
        "ground_truth" if "answer" not in row and isinstance(row.get("ground_truth"), str | int | float) else "answer"
    )
    taken = {"id": True, "completion": True, "prompt": False, truth: False, "domain": False}
    texts: dict[str, str] = {}
    for key, required in taken.items():
        value = row.get(key)
        if value is None and not required:
            continue
        if key == truth and isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)  # as data sets publish them
        if not isinstance(value, str):
            what = "is missing" if key not in row else f"must be text, not {type(value).__name__}"
            raise UserError(f"{where}: {key} {what}; a line is like {EXAMPLE}")
        texts[key] = value
    rest = {key: value for key, value in row.items() if key not in taken or key == "ground_truth"}
    return Sample(
        id=texts["id"],
        prompt=texts.get("prompt", ""),
        completion=texts["completion"],
        ground_truth=texts.get(truth),
        domain=texts.get("domain", "user"),
        metadata=rest,
    )
