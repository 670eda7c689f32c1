"""What a run's answers took up, from the files that it left."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from align.report import habits, write_report
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


def test_what_weights_drawn_at_random_say_is_no_start(write_run: WriteRun) -> None:
    write_run("run", evaluations=[(evaluation("after GRPO", step=4), rows(40))])
    before, after = (evaluation("before SFT"), rows(40, range(40))), (evaluation("after SFT", step=4), rows(40))
    write_run("run/sft", stage="sft", evaluations=[before, after], recipe={"model": {"init": "random"}})
    run = read_run(Path(write_run("other")).parent / "run")
    [told] = evaluation_habits(run)
    assert (told.name, told.against) == ("grpo: after GRPO", "sft: after SFT")
    assert told.found.sentences == []


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


def test_steps_that_take_the_same_few_prompts_are_compared_as_others_are(write_run: WriteRun) -> None:
    samples = {step: rows(22, range(22) if step > 5 else ()) for step in range(1, 11)}
    found = {told.name: told.found for told in step_habits(read_run(write_run(samples=samples)).whole)}
    assert list(found) == [f"grpo, step {step}" for step in range(3, 11)]
    assert (found["grpo, step 10"].before, found["grpo, step 10"].after) == (44, 44)
    assert "quotation mark" in found["grpo, step 10"].sentences[0]


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


def test_of_a_long_run_the_steps_between_are_not_read(write_run: WriteRun, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    looked_at = habits.found_in
    monkeypatch.setattr(habits, "found_in", lambda file: (read.append(file.stem), looked_at(file))[1])
    run = read_run(write_run(samples={step: rows(12, first=12 * step) for step in range(1, 61)}))
    [last] = step_habits(run.whole, last=True)
    assert read == [f"step_{step:05d}" for step in (1, 2, *range(25, 61))]
    assert (last.found.before, last.found.after) == (24, 36)


def test_the_page_has_the_last_evaluation_of_a_stage_and_split(write_run: WriteRun) -> None:
    made = [(evaluation(f"GRPO step {n}", split="validation"), rows(40)) for n in range(4)]
    told = evaluation_habits(read_run(write_run(evaluations=[*made, (evaluation("after"), rows(40))])), last=True)
    assert [each.name for each in told] == ["GRPO step 3"]
