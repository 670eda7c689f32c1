"""What a run's answers took up, from the files that it left."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from align.report import write_report
from align.report.habits import evaluation_habits, last_evaluation_habits, step_habits
from align.report.read import read_run

WriteRun = Callable[..., Path]
TEXT = "The answer to number {} is that it is what it is"


def rows(count: int, quoted: Sequence[int] = (), first: int = 0) -> list[dict[str, Any]]:
    return [
        {
            "id": f"p{n}",
            "domain": "chat",
            "prompt": f"Tell me about number {n}.",
            "completion": f'"{TEXT.format(n)}."' if n in quoted else f"{TEXT.format(n)}.",
            "greedy": True,
            "verdict": "pass",
            "finish_reason": "stop",
        }
        for n in range(first, first + count)
    ]


def evaluation(name: str, **more: Any) -> dict[str, Any]:
    return {"stage": "grpo", "step": 0, "name": name, "problems": 40, "accuracy": 1.0, "verdicts": {"pass": 40}, **more}


def test_evaluations_are_compared_with_the_first_of_the_same_problems(write_run: WriteRun) -> None:
    run = write_run(
        evaluations=[
            (evaluation("before GRPO"), rows(40)),
            (evaluation("GRPO step 2, validation", split="validation"), rows(40, range(100, 140), first=100)),
            (evaluation("GRPO step 4, validation", split="validation"), rows(40, range(100, 140), first=100)),
            (evaluation("after GRPO"), rows(40, range(30))),
        ]
    )
    validation, after = evaluation_habits(read_run(run))
    assert (validation.name, validation.against) == ("GRPO step 4, validation", "GRPO step 2, validation")
    assert validation.found.sentences == []
    assert (after.name, after.against) == ("after GRPO", "before GRPO")
    assert after.found.sentences == ['75 % of answers are wrapped in “"” (quotation mark); 0 % were at the start']


def test_a_stage_is_compared_with_the_start_of_the_run_around_it(write_run: WriteRun) -> None:
    write_run("run", evaluations=[(evaluation("after GRPO"), rows(40, range(40)))])
    write_run("run/sft", stage="sft", evaluations=[(evaluation("before SFT"), rows(40))])
    run = read_run(Path(write_run("other")).parent / "run")
    told = last_evaluation_habits(run.path, "after GRPO")
    assert told is not None
    assert (told.name, told.against) == ("grpo: after GRPO", "sft: before SFT")
    assert "are wrapped in" in told.found.sentences[0]
    assert last_evaluation_habits(run.path / "sft", "before SFT") is None


def test_the_last_steps_are_compared_with_the_first(write_run: WriteRun) -> None:
    """12 prompts a step: two steps are the start, and the others are looked at three at a time."""
    samples = {
        step: rows(12, range(12 * step, 12 * step + 12) if step > 5 else (), first=12 * step) for step in range(1, 11)
    }
    run = read_run(write_run(samples=samples))
    found = {told.name: told.found for told in step_habits(run.whole)}
    assert list(found) == [f"grpo, step {step}" for step in range(3, 11)]
    assert found["grpo, step 5"].sentences == []
    assert "quotation mark" in found["grpo, step 8"].sentences[0]
    assert found["grpo, step 10"].before == 24
    assert found["grpo, step 10"].after == 36
    [last] = step_habits(run.whole, last=True)
    assert last.name == "grpo, step 10"


def test_the_page_and_the_markdown_tell_them_with_examples(write_run: WriteRun) -> None:
    run = write_run(
        evaluations=[(evaluation("before GRPO"), rows(40)), (evaluation("after GRPO"), rows(40, range(40)))]
    )
    page = write_report(run)
    assert "100 % of answers are wrapped in" in page.read_text()
    markdown = page.with_suffix(".md").read_text()
    assert "## Habits" in markdown
    assert "The answer to number 0" in markdown


def test_a_run_without_two_sets_of_answers_has_no_such_section(write_run: WriteRun) -> None:
    run = write_run(evaluations=[(evaluation("before GRPO"), rows(40))])
    assert "## Habits" not in write_report(run).with_suffix(".md").read_text()
