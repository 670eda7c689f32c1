"""Completions scored by a reward, without a model: a file of them, or those that a run has stored of its steps."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import count, groupby
from pathlib import Path
from typing import Any

from align.data.files import files_of, readable
from align.data.forms import FORMS, conversation_of
from align.data.own_rows import holds_messages, with_system
from align.data.rows import Row
from align.data.types import Message
from align.errors import UserError, reward_errors
from align.evaluate.accuracy import mean_of
from align.experience import is_scored_row, sample_of
from align.run import RunDirectory, read_status, write_jsonl
from align.run.files import read_parquet, refuse_existing
from reward import Mixture, RewardTerm, Sample, SampleReward
from reward.rows import as_messages, prompt_column, sample_of_row

EXAMPLE = '{"id": "1", "completion": "It is \\\\boxed{4}.", "ground_truth": "4"}'
STORED = ("id", "index", "domain", "prompt", "completion", "answer", "metadata", "finish_reason", "verdict", "reward")


def score_file(term: RewardTerm, data: Path, out: Path) -> str:
    """Score every line of `data` and write id, value, verdict, detail and seconds of each to `out`; returns a summary.

    `data` is any file that `align.data.files` reads. A row has `id` and `completion`, or `key` and `response` as IFEval publishes them; it may
    have a prompt, a ground truth and a domain in the columns that `reward.rows` names, and every other column, such as `tests`, goes to the
    reward as metadata. Rows that `align eval` wrote are the samples that they were. A sample that nobody could judge has the value null.
    Raises UserError with file and row.
    """
    refuse_existing(out)
    rows = rows_of(data)
    samples = [sample_of_line(row) for row in rows]
    rewards = scored_in_groups(mixture_of(term), samples)
    greedy = [
        {"greedy": row.values["greedy"]} if is_scored_row(row.values) and "greedy" in row.values else {} for row in rows
    ]
    lines = [line | own for line, own in zip(score_lines(term, samples, rewards), greedy, strict=True)]
    write_jsonl(out, lines)
    mean = (
        f"mean value {mean_value(rewards):.3f}" if any(r.value is not None for r in rewards) else "none could be judged"
    )
    verdicts = ", ".join(f"{number} {name}" for name, number in sorted(Counter(x["verdict"] for x in lines).items()))
    return f"{len(samples)} completions, {mean} ({verdicts}); scores are in {out}"


def rows_of(data: Path) -> list[Row]:
    """The rows of a file of completions. Raises UserError where it has none."""
    rows = [row for file in files_of(data) for row in readable(file)]
    if not rows:
        raise UserError(f"{data} is empty: each line must be like {EXAMPLE}")
    return rows


def score_run(term: RewardTerm, run: Path, out: Path) -> Iterator[str]:
    """Score what a run has stored of its steps, and write a line for each sample to `out`; yields the mean of each step, and a summary.

    The answers to a prompt are scored together, as in training. Raises UserError where the run has stored none, or the reward cannot be used.
    """
    refuse_existing(out)
    files = sorted(RunDirectory(run).samples_directory.glob("step_*.parquet"))
    if not files:
        raise UserError(
            f"{run} has stored no samples of steps (samples/step_*.parquet); give the directory of a GRPO run"
        )
    mixture, lines, without_metadata = mixture_of(term), [], False
    for file in files:
        step, rows = int(file.stem.removeprefix("step_")), read_parquet(file, STORED).to_pylist()
        without_metadata |= any("metadata" not in row for row in rows)
        samples = [sample_of(row) for row in rows]
        groups = [list(group) for _, group in groupby(samples, lambda sample: sample.id.rpartition("#")[0])]
        rewards = [reward for group in groups for reward in scored(mixture, group)]
        found = score_lines(term, samples, rewards)
        lines += [{"step": step, **line, "reward": row["reward"]} for line, row in zip(found, rows, strict=True)]
        before = mean_of([row["reward"] for row in rows if row["reward"] is not None])
        masked = sum(reward.value is None for reward in rewards)
        not_scored = f"; {masked} of {len(rewards)} not scored" if masked else ""
        yield f"step {step}: {mean_value(rewards):.4f} by {term.component}, {before:.4f} in the run{not_scored}"
    write_jsonl(out, lines)
    if without_metadata:
        yield f"{run} is of an earlier version, which stored no columns of the data: a reward that reads them could not score"
    if reason := next((line["detail"] for line in lines if line["value"] is None), None):
        yield f"not scored, the first: {reason}"
    yield f"{len(lines)} samples of {len(files)} steps; scores are in {out}"


def default_out(run: Path, name: str) -> Path:
    """A file in the run's `scores/` that is not there yet: NAME.jsonl, or NAME-2.jsonl, ...

    Raises UserError where there is no run.
    """
    if read_status(run) is None:
        raise UserError(f"{run} holds no run; give the directory of one, such as runs/nano-grpo")
    directory = RunDirectory(run).scores_directory
    names = (directory / f"{name}{f'-{number}' if number > 1 else ''}.jsonl" for number in count(1))
    return next(path for path in names if not path.exists())


@reward_errors()
def mixture_of(term: RewardTerm) -> Mixture:
    """A reward alone, however few samples it scores. Raises UserError where it cannot be used here now."""
    mixture = Mixture([term], infra_error_limit=1.0)
    mixture.check_ready()
    return mixture


@reward_errors()
def scored(mixture: Mixture, samples: Sequence[Sample]) -> list[SampleReward]:
    """The rewards of samples. Raises UserError where the reward breaks its contract."""
    return mixture.score(samples)


def scored_in_groups(mixture: Mixture, samples: Sequence[Sample]) -> list[SampleReward]:
    """The rewards of samples: of a reward that compares those of a batch, those of a prompt in a row are one, as in training. Raises as `scored` does."""
    if not mixture.depends_on_batch:
        return scored(mixture, samples)
    groups = groupby(samples, lambda one: (one.domain, one.prompt, one.id.rpartition("#")[0] or one.prompt or one.id))
    return [reward for _, group in groups for reward in scored(mixture, list(group))]


def score_lines(term: RewardTerm, samples: Sequence[Sample], rewards: Sequence[SampleReward]) -> list[dict[str, Any]]:
    """What is written of each sample."""
    scores = [reward.components[term.component] for reward in rewards]
    return [
        {"id": s.id, "value": r.value, "verdict": str(c.verdict), "detail": c.detail, "seconds": c.seconds}
        for s, r, c in zip(samples, rewards, scores, strict=True)
    ]


def mean_value(rewards: Sequence[SampleReward]) -> float:
    """The mean of the rewards that are not None; NaN where there is none."""
    return mean_of([reward.value for reward in rewards if reward.value is not None])


def sample_of_line(row: Row) -> Sample:
    """The sample of a row of a file of completions. Raises UserError with file and row."""
    values = row.values
    if is_scored_row(values):
        return sample_of(values)
    id_column = "key" if "id" not in values and "key" in values else "id"
    column = "response" if "completion" not in values and "response" in values else "completion"
    for key in (id_column, column, "prompt", "ground_truth" if "answer" not in values else "answer", "domain"):
        value, required = values.get(key), key in (id_column, column)
        fits = (
            isinstance(value, str)
            or (value is None and not required)
            or (key == id_column and isinstance(value, int | float) and not isinstance(value, bool))
            or (key in (column, "prompt") and isinstance(value, list))
            or key in ("answer", "ground_truth")  # of which only the reward knows what they must be
        )
        if not fits:
            what = "is missing" if key not in values else f"must be text, not {type(value).__name__}"
            raise UserError(f"{row.where}: {key} {what}; a line is like {EXAMPLE}")
    completion = values[column]
    if not isinstance(completion, str):
        completion = row.messages(column, "assistant")[-1]["content"]
    prompt, columns = demonstrated_prompt(Row({n: v for n, v in values.items() if n != column}, row.where))
    if isinstance(values.get("prompt"), list):
        prompt = with_system(row, row.conversation("prompt"))
    if prompt is None and (name := prompt_column(values)):
        refuse_no_prompt(row, name)
        value = values[name]
        other_form = holds_messages(value) if isinstance(value, str) else any("role" not in one for one in value)
        turns: Any = row.conversation(name) if other_form else tuple(as_messages(value))
        if other_form or len(with_system(row, turns)) > len(turns):
            prompt, columns = with_system(row, turns), (*columns, name)
    return sample_of_row(values, completion, id=str(values[id_column]), prompt=prompt, taken=(column, *columns))


def refuse_no_prompt(row: Row, column: str) -> None:
    """Raise UserError where a column that should hold a prompt has neither a text nor messages."""
    value = row.values[column]
    if not isinstance(value, str) and not (isinstance(value, list) and all(map(_may_be_said, value))):
        raise row.error(column, f"must be a prompt, a text or a list of messages, not {value!r:.40}")


def _may_be_said(turn: Any) -> bool:
    content = turn.get("content") if isinstance(turn, Mapping) else 0
    parts = content if isinstance(content, list) else []
    return (content is None or isinstance(content, str | list)) and all(isinstance(part, Mapping) for part in parts)


def demonstrated_prompt(row: Row) -> tuple[tuple[Message, ...] | None, tuple[str, ...]]:
    """The prompt of a row that is a conversation, and the columns that it is from; None and none of any other row.

    It is what training and evaluation ask: the answer that is scored stands in the place of the one that the row may end in.
    """
    if prompt_column(row.values) not in (None, "messages"):
        return None, ()
    form = next((form for form in FORMS if form.fits(row)), None)
    if form is None or form.kind != "conversations":
        return None, ()
    turns, columns = conversation_of(form, row)
    return turns[:-1] if turns[-1]["role"] == "assistant" else turns, columns
