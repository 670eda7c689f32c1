"""`align habits`: two sets of answers compared, or a run with its start; told in sentences with examples."""

from collections.abc import Iterator
from pathlib import Path

from align.data.rows import Row
from align.errors import UserError
from align.habits import Answer, Comparison, Found, answer_of_row, compare
from align.report.habits import evaluation_habits, step_habits
from align.report.read import RunRecord, read_run
from align.run import read_samples, read_status
from align.tools.score_file import refuse_no_prompt, rows_of
from reward.rows import as_messages, prompt_column, request_of

TEXTS = ("completion", "response", "answer")


def answers_in(path: Path) -> list[Answer]:
    """The answers of a file of samples or rows; of a run directory those of its last evaluation, or of its last samples.

    The answer is in the first of `TEXTS` that a row has: a text, or messages of which it is the last. A row may have a prompt in one of the columns
    that `reward.rows` names, a `domain`, and what the reward `instructions` reads. Of rows that `greedy` marks, these alone count. Raises UserError.
    """
    if path.is_dir() and read_status(path) is not None:
        return answers_in(_last_file(read_run(path), path))
    if not path.is_file():
        raise UserError(f"{path} is neither a run directory nor a file of answers")
    rows = [Row(row, str(path)) for row in read_samples(path)] if path.suffix == ".parquet" else rows_of(path)
    greedy = [row for row in rows if row.values.get("greedy", True)]
    if not rows:
        raise UserError(f"{path} has no answers")
    return [_answer(row) for row in greedy or rows]


def compare_answers(before: Path, after: Path) -> Iterator[str]:
    """What the answers in `after` have that those in `before` did not, and the other way round; the lines to print. Raises UserError."""
    yield from told(f"{after} against {before}", compare(*(Found.of(answers_in(path)) for path in (before, after))))


def run_habits(path: Path, start: Path | None) -> Iterator[str]:
    """A run's evaluations, and the samples of its steps, against its start, or against the answers in `start`; the lines to print. Raises UserError.

    Of the steps a habit is told once, at the first step that has it.
    """
    run, given = read_run(path), Found.of(answers_in(start)) if start else None
    compared = 0
    for each in () if given else evaluation_habits(run):
        compared += 1
        yield from told(f"{each.name}, against {each.against}", each.found)
    for stage in run.stages:
        known: set[object] = set()
        for each in step_habits(stage, start=given):
            compared += 1
            new = [h for h in each.found.habits if (h.domain, h.named, h.taken_up) not in known]
            known |= {(h.domain, feature, h.taken_up) for h in each.found.habits for feature in h.tells}
            length = [each.found.length.sentence] if each.found.length.changed and "length" not in known else []
            known |= {"length"} if length else set()
            for sentence, examples in [(text, ()) for text in length] + [(h.sentence, h.examples) for h in new]:
                yield f"{each.name}, against {each.against}: {sentence}"
                yield from (f"    {example}" for example in examples)
    if not compared:
        raise UserError(
            f"{path} has nothing to compare: no two evaluations of the same problems, and no samples of steps (samples/) after the first ones"
        )
    yield f"{compared} comparisons; of the steps a habit is told once"


def told(title: str, found: Comparison) -> Iterator[str]:
    """A comparison in lines."""
    yield f"{title} ({found.before} and {found.after} answers to {found.prompts} prompts, {found.features} features)"
    if not found.sentences:
        yield "  no habit taken up or lost"
    if found.length.changed:
        yield f"  {found.length.sentence}"
    for habit in found.habits:
        yield f"  {habit.sentence}"
        yield from (f"      {example}" for example in habit.examples)


def _last_file(run: RunRecord, path: Path) -> Path:
    for stage in reversed(run.stages):
        for record in reversed(stage.evaluations):
            if "verdicts" in record and (file := stage.evaluation_file(str(record.get("name")))):
                return file
        if stage.samples:
            return stage.samples[max(stage.samples)]
    raise UserError(f"{path} has no answers: neither evaluations nor samples of steps")


def _answer(row: Row) -> Answer:
    column = next((name for name in TEXTS if row.values.get(name) is not None), None)
    if column is None or (column == "answer" and {"completion", "response"} & row.values.keys()):
        raise UserError(f"{row.where}: no answer; a row has it as text in `completion` or `response`")
    said = row.values[column]
    text = said if isinstance(said, str) else row.messages(column, "assistant")[-1]["content"]
    asked = prompt_column(row.values)
    if asked:
        refuse_no_prompt(row, asked)
    prompt = request_of(as_messages(row.values[asked])) if asked else None
    return answer_of_row({**row.values, "completion": text, "prompt": prompt})
