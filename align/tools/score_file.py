"""A user's own file of completions, scored by a registered reward."""

from collections import Counter
from pathlib import Path

from align.data.files import files_of, readable
from align.data.rows import Row
from align.errors import UserError
from align.run import write_jsonl
from reward import Mixture, RewardError, RewardTerm, Sample
from reward.rows import sample_of_row

EXAMPLE = '{"id": "1", "completion": "It is \\\\boxed{4}.", "ground_truth": "4"}'


def score_file(term: RewardTerm, data: Path, out: Path) -> str:
    """Score every line of `data` and write id, value, verdict, detail and seconds of each to `out`; returns a summary.

    `data` is any file that `align.data.files` reads. A row has `id` and `completion`, or `key` and `response` as IFEval publishes them; it may
    have a prompt, a ground truth and a domain in the columns that `reward.rows` names, and every other column, such as `tests`, goes to the
    reward as metadata. A sample that nobody could judge has the value null. Raises UserError with file and row.
    """
    if out.exists():
        raise UserError(f"--out {out} exists already; give another file, or take it away")
    samples = [_sample(row) for file in files_of(data) for row in readable(file)]
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


def _sample(row: Row) -> Sample:
    values = row.values
    id_column = "key" if "id" not in values and "key" in values else "id"
    column = "response" if "completion" not in values and "response" in values else "completion"
    for key in (id_column, column, "prompt", "ground_truth" if "answer" not in values else "answer", "domain"):
        value, required = values.get(key), key in (id_column, column)
        fits = (
            isinstance(value, str)
            or (value is None and not required)
            or (key in (id_column, "answer") and isinstance(value, int | float) and not isinstance(value, bool))
            or (key in (column, "prompt") and isinstance(value, list))
            or key == "ground_truth"  # of which only the reward knows what it must be
        )
        if not fits:
            what = "is missing" if key not in values else f"must be text, not {type(value).__name__}"
            raise UserError(f"{row.where}: {key} {what}; a line is like {EXAMPLE}")
    completion = values[column]
    if not isinstance(completion, str):
        completion = row.messages(column, "assistant")[-1]["content"]
    return sample_of_row(
        values,
        completion,
        id=str(values[id_column]),
        prompt=row.conversation("prompt") if isinstance(values.get("prompt"), list) else None,
        taken=(column,),
    )
