"""What a policy is evaluated on: the test split before and after a stage, the validation split to choose checkpoints by."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, call

import pytest

from align.errors import AlarmError, UserError
from align.evaluate import hooks
from align.evaluate.accuracy import Evaluation
from align.model.policy import load_tokenizer
from align.recipe import GrpoRecipe, PolicyRecipe, SftRecipe, load_recipe
from align.run import RunDirectory, write_samples
from align.session.checks import check_names
from align.session.run import Run, open_run
from align.session.session import Session
from align.stages import grpo
from align.stages import held_out as held_out_module
from align.stages.held_out import HeldOut, Problems, answers_of, check_comparable, load_problems
from reward import Sample, SampleReward, Score, Verdict
from rollout import FinishReason, Group, Prompt, RolloutError, Trajectory

NANO = Path("recipes/nano/grpo.yaml")
DRIFT = "evaluation.hooks=[{name: drift}]"
RIGHT = Score(1.0, Verdict.PASS)
TOKENIZER = load_tokenizer("recipes/nano/policy")


class Fleet:
    """Ends every answer at once, and keeps the ids of what it was asked."""

    weight_version = 0

    def __init__(self) -> None:
        self.asked: list[str] = []

    def sample(self, prompts: Sequence[Prompt], group_size: int, *_: Any, seed: int, step: int) -> Iterator[Group]:
        for prompt in prompts:
            self.asked.append(prompt.id)
            ended = Trajectory.of_one_turn(prompt, 0, [1], [0.0], FinishReason.STOP, seed=seed)
            yield Group(prompt, [ended] * group_size)


class Judges:
    def submit(self, samples: Sequence[Sample]) -> Sequence[Sample]:
        return samples

    def gather(self, tickets: Sequence[Sequence[Sample]], *, alone: bool = False) -> list[list[SampleReward]]:
        return [[SampleReward(1.0, Verdict.PASS, {"exact_answer": RIGHT})] * len(samples) for samples in tickets]


def session(run: Run, made: GrpoRecipe, fleet: Fleet) -> Session:
    opened = Session(run, made.model, TOKENIZER)
    opened.fleet, opened.pool = fleet, Judges()  # type: ignore[assignment]
    return opened


def problems_of(made: GrpoRecipe) -> Problems:
    return load_problems(made.evaluation, made.data, made.rewards, made.rollout.max_length, TOKENIZER, MagicMock())


def recipe(directory: Path, *overrides: str) -> GrpoRecipe:
    own = [f"run.dir={directory}", "init_from=null", "machine={}", "evaluation.samples=0", "evaluation.limit=20"]
    loaded = load_recipe(NANO, [*own, *overrides])
    assert isinstance(loaded, GrpoRecipe)
    return loaded


@pytest.mark.parametrize("split", ["validation", "test"])
def test_the_problems_are_of_the_split_that_is_held_out(split: str, tmp_path: Path) -> None:
    problems = problems_of(recipe(tmp_path, f"evaluation.split={split}"))
    assert len(problems.problems) == 20
    assert all(problem.prompt.id.startswith(f"nano_math/{split}/") for problem in problems.problems)
    assert {prompt.id for prompt in problems.probe} <= {problem.prompt.id for problem in problems.problems}


def test_checkpoints_are_chosen_by_validation_problems_and_the_test_is_left_for_the_end(tmp_path: Path) -> None:
    made = recipe(tmp_path / "run", "evaluation.every=5")
    fleet: Any = Fleet()
    with open_run(made) as run:
        problems = problems_of(made)
        run.progress.stage("GRPO", 40)
        held_out = HeldOut(made, problems, session(run, made, fleet))
        assert held_out.on_validation().evaluate("GRPO step 5", 5).accuracy == 1.0
        chosen_by, fleet.asked = fleet.asked, []
        held_out.evaluate("after GRPO", 40)
    assert len(chosen_by) == len(fleet.asked) == 20
    assert all(id_.startswith("nano_math/validation/") for id_ in chosen_by)
    assert all(id_.startswith("nano_math/test/") for id_ in fleet.asked)
    records = [json.loads(line) for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()]
    assert [(r["name"], r.get("split")) for r in records] == [
        ("GRPO step 5, validation", "validation"),
        ("after GRPO", None),
    ]
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [("validation/accuracy" in m, "evaluation/accuracy" in m) for m in metrics] == [(True, False), (False, True)]


def test_everything_that_is_evaluated_on_is_held_out_whatever_the_limit(tmp_path: Path) -> None:
    for every, splits in (("null", {"test"}), ("5", {"test", "validation"})):
        made = recipe(tmp_path / f"run_{every}", f"evaluation.every={every}")
        problems = problems_of(made)
        assert problems.prompts.keys() == {f"nano_math/{split}" for split in splits}
        assert min(len(prompts) for prompts in problems.prompts.values()) > 500


def test_without_a_validation_split_no_checkpoint_can_be_chosen() -> None:
    made = load_recipe(NANO, ["evaluation={every: 5, cards: [humaneval]}", "rewards=[{name: code_tests}]"])
    with pytest.raises(
        UserError, match=r"evaluation\.every: checkpoints are chosen by the validation split, and humaneval"
    ):
        check_names(made.data, made.data_stage, made.roles())


def test_two_evaluated_cards_of_one_name_are_refused(tmp_path: Path) -> None:
    same = tmp_path / "nano_math.md"
    same.write_text(Path("data_cards/nano_math.md").read_text())
    made = load_recipe(NANO, [f"evaluation.cards=[nano_math, {same}]"])
    with pytest.raises(UserError, match=r"2 cards are named 'nano_math'"):
        check_names(made.data, made.data_stage, made.roles())


def test_prompts_that_are_too_long_to_be_answered_are_on_record(tmp_path: Path) -> None:
    made = recipe(
        tmp_path / "run", "rollout.max_length=62", "evaluation.max_new_tokens=46", "sampling.max_new_tokens=8"
    )
    problems = problems_of(made)
    with open_run(made) as run:
        HeldOut(made, problems, session(run, made, Fleet()))
        [found] = [
            e for e in map(json.loads, (tmp_path / "run" / "events.jsonl").read_text().splitlines()) if "too_long" in e
        ]
    assert len(problems.problems) == 20
    assert 0 < found["too_long"] < 20
    assert all(len(prompt.token_ids) <= 16 for prompt in problems.probe)


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        ("[{name: drift}, {name: drift, params: {count: 5}}]", "two hooks are called 'drift'"),
        ("[{name: drift, label: after GRPO}]", "as the stage's own evaluations are"),
        ("[{name: drift, label: ../drift}]", r"evaluation\.hooks\.0\.label"),
    ],
)
def test_results_of_hooks_overwrite_nothing(hooks: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe(NANO, [f"evaluation.hooks={hooks}"])
    load_recipe(NANO, ["evaluation.hooks=[{name: drift}, {name: drift, label: more drift, params: {count: 5}}]"])


@pytest.mark.parametrize("ended", [{}, {"unrated": 1}], ids=["a run", "one that ended in an evaluation"])
def test_what_grpo_rates_its_checkpoints_by_are_those_problems(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ended: dict[str, int]
) -> None:
    made = recipe(tmp_path / "run", "evaluation.every=2", "grpo.steps=5", "evaluation.before=false")
    held_out, steps, opened = MagicMock(), MagicMock(), MagicMock()
    held_out.on_validation.return_value.evaluate.side_effect = lambda name, step: SimpleNamespace(accuracy=step / 10)
    opened.learning.return_value.__enter__.return_value = steps
    steps.__iter__.return_value = range(5)
    steps.state = {"weight_version": 0, "learning_steps": 0, "guard": [], "alarms": None, **ended}
    opened.fleet.weight_version = 0
    opened.new_learner.return_value.update.return_value = (MagicMock(), 1.0)
    monkeypatch.setattr(grpo, "HeldOut", lambda *_: held_out)
    for name in ("submit", "gather", "compare", "updates_of", "sample_rows", "Guards"):
        monkeypatch.setattr(grpo, name, MagicMock())
    monkeypatch.setattr(grpo, "step_metrics", lambda *_, **__: {})
    opened.new_learner.return_value.expert_load.return_value = {}
    monkeypatch.setattr(grpo, "items_of_step", lambda *_, **__: [])
    grpo.train_grpo(made, MagicMock(), opened)
    first = [call(step, step / 10) for step in ended.values()]
    assert steps.note_accuracy.call_args_list == [*first, call(2, 0.2), call(4, 0.4)]
    assert "unrated" not in steps.state
    assert [asked.args[0] for asked in held_out.evaluate.call_args_list] == ["after GRPO"]


def tell_habits(monkeypatch: pytest.MonkeyPatch, made: PolicyRecipe) -> list[dict[str, Any]]:
    """The events of a stage whose answers are all in quotation marks after it, and which has drifted."""
    stage = "SFT" if made.stage == "sft" else "GRPO"
    found = {f"{stage} step 2": "It is number {}.", f"after {stage}": '"It is number {}."'}

    def answered(name: str) -> Evaluation:
        row = {"prompt": "", "domain": "chat", "greedy": True, "verdict": "pass", "finish_reason": "stop"}
        rows = [row | {"id": str(n), "prompt": f"About {n}?", "completion": found[name].format(n)} for n in range(40)]
        return Evaluation(40, 1.0, 5.0, 0.0, verdicts={"pass": 40}, rows=rows)

    with open_run(made) as run:
        run.progress.stage(stage, 4)
        session = MagicMock(run=run, policy=made.model)
        held_out = HeldOut(made, Problems([], []), session)
        monkeypatch.setattr(HeldOut, "_rates", lambda *_: {})
        for step, name in zip((2, 4), found, strict=True):
            monkeypatch.setattr(held_out_module, "evaluate", lambda *_, name=name, **__: answered(name))
            held_out.evaluate(name, step)
        monkeypatch.setattr(hooks, "run", lambda *_: hooks.Metrics({"difference": 1.2}))
        held_out.run_hooks(made.model, 4)
        return [json.loads(line) for line in run.directory.events_file.read_text().splitlines()]


def sft_recipe(directory: Path, *overrides: str) -> SftRecipe:
    made = load_recipe(Path("recipes/nano/sft.yaml"), [f"run.dir={directory}", "machine={}", DRIFT, *overrides])
    assert isinstance(made, SftRecipe)
    return made


@pytest.mark.parametrize("stage", ["GRPO", "SFT"])
def test_an_evaluation_tells_the_habits_and_the_drift_hook_that_the_policy_has_moved(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stage: str
) -> None:
    made = sft_recipe(tmp_path / "run") if stage == "SFT" else recipe(tmp_path / "run", DRIFT, "alarms.stop=[habit]")
    events = tell_habits(monkeypatch, made)
    [told] = [event for event in events if event["kind"] == "habits"]
    assert told["evaluation"] == f"after {stage}"
    assert "100 % of answers are wrapped in" in told["habits"][0]["sentence"]
    assert told["habits"][0]["examples"][0].startswith('"It is number')
    assert {"habit", "drift"} == {event["alarm"] for event in events if "alarm" in event}


def test_a_habit_to_be_warned_of_is_said_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tell_habits(monkeypatch, sft_recipe(tmp_path / "run"))
    said = "".join(capsys.readouterr())
    assert said.count("are wrapped in") == 1
    assert "  warning: 100 % of answers are wrapped in" in said


def test_a_habit_after_sft_can_end_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(AlarmError, match=r"100 % of answers are wrapped in .*alarms\.stop names habit"):
        tell_habits(monkeypatch, sft_recipe(tmp_path / "run", "alarms.stop=[habit]"))


def test_what_a_run_goes_on_with_is_not_called_its_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = recipe(tmp_path / "run")
    with open_run(made) as run:
        run.progress.stage("GRPO", 4)
        held_out = HeldOut(made, Problems([], []), MagicMock(run=run, policy=made.model))
        monkeypatch.setattr(HeldOut, "evaluate", lambda *_: "evaluated")
        assert held_out.evaluate_start("before GRPO", 2) == {}
        assert held_out.evaluate_start("before GRPO", 0) == {"before GRPO": "evaluated"}
        run.record_evaluation("grpo", 0, "before GRPO", Evaluation(1, 1.0, 1.0, 0.0))
        assert held_out.evaluate_start("before GRPO", 2) == {"before GRPO": "evaluated"}


def test_answers_to_other_prompts_or_without_the_judge_are_not_compared_with() -> None:
    problem = problems_of(recipe(Path("run"))).problems[0]
    row = {"id": problem.example.id, "prompt": problem.example.prompt_text, "greedy": True}
    row |= {"components": {"math": 1.0, "helpful": None}}
    other = row | {"prompt": "Another?", "components": {"helpful": 1.0}}
    drawn = row | {"greedy": False, "components": {"helpful": 1.0}}
    check_comparable([problem], [row, other], Path("other"), "math")
    with pytest.raises(UserError, match="the answers of other are to none of the prompts that are evaluated here"):
        check_comparable([problem], [other], Path("other"), "math")
    with pytest.raises(UserError, match=r"judge: other scored none .* called 'helpful'; it did by math\. Cure: "):
        check_comparable([problem], [row, other, drawn], Path("other"), "helpful")


def test_what_a_hook_measured_is_no_evaluation_to_compare_with(tmp_path: Path) -> None:
    with open_run(sft_recipe(tmp_path / "run")) as run:
        run.record_numbers("sft", 0, "after", {"accuracy": 1.0}, [{"id": "a"}], {"problems": 1})
        run.record_numbers("sft", 0, "mine", {"accuracy": 0.5}, [{"id": "of a hook"}])
    assert answers_of(tmp_path / "run") == [{"id": "a"}]


def test_a_hook_that_fails_is_a_warning_and_the_others_are_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    odd, good = hooks.Metrics({"a": 1.0}, rows=[{"of": 1}, {"of": "two"}]), hooks.Metrics({"b": 2.0})
    failing = [hooks.EvaluationError("the server is away"), UserError("no such task"), ConnectionError("reset"), odd]
    hooks_ = ", ".join(f"{{name: drift, label: hook {n}}}" for n in range(5))
    made = sft_recipe(tmp_path / "run", f"evaluation.hooks=[{hooks_}]")
    with open_run(made) as run:
        run.progress.stage("SFT", 4)
        monkeypatch.setattr(hooks, "run", MagicMock(side_effect=[*failing, good]))
        HeldOut(made, Problems([], []), MagicMock(run=run, policy=made.model)).run_hooks(made.model, 4)
        warned = [json.loads(line)["message"] for line in run.directory.events_file.read_text().splitlines()]
        found = [json.loads(line) for line in run.directory.evaluations_file.read_text().splitlines()]
    for said in ("the server is away", "no such task", "reset", "Could not convert"):
        assert any("all of it was not run" in line and said in line for line in warned)
    assert len([line for line in warned if "was not run" in line]) == len(failing)
    measured = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert found[-1]["b"] == 2.0
    assert measured[-1]["evaluation/hook 4/b"] == 2.0


def test_what_a_hook_measures_is_no_metric_of_the_held_out_problems(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = sft_recipe(tmp_path / "run", "evaluation.hooks=[{name: drift}]")
    with open_run(made) as run:
        run.progress.stage("SFT", 4)
        monkeypatch.setattr(hooks, "run", lambda *_: hooks.Metrics({"accuracy": 0.5}))
        HeldOut(made, Problems([], []), MagicMock(run=run, policy=made.model)).run_hooks(made.model, 4)
    [measured] = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert measured["evaluation/drift/accuracy"] == 0.5
    assert "evaluation/accuracy" not in measured


def test_rollout_workers_that_fail_in_a_hook_end_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = sft_recipe(tmp_path / "run")
    with open_run(made) as run:
        run.progress.stage("SFT", 4)
        monkeypatch.setattr(hooks, "run", MagicMock(side_effect=RolloutError("no worker is left")))
        with pytest.raises(RolloutError):
            HeldOut(made, Problems([], []), MagicMock(run=run, policy=made.model)).run_hooks(made.model, 4)


@pytest.mark.parametrize(
    ("asked", "after_sft", "again"),
    [
        ([("a", "A?", "pass"), ("b", "B?", "wrong"), ("c", "C?", "pass")], True, False),
        ([("a", "A?", "pass")], True, True),
        ([("a", "A?", "pass"), ("b", "another", "pass")], True, True),
        ([("a", "A?", "pass"), ("b", "B?", "unscored")], True, True),
        ([("a", "A?", "pass"), ("b", "B?", "wrong")], False, True),
        (None, True, True),
    ],
)
def test_problems_whose_answers_sft_has_just_had_scored_need_not_be_asked_again(
    asked: list[tuple[str, str, str]] | None, after_sft: bool, again: bool, tmp_path: Path
) -> None:
    if asked is not None:
        table = RunDirectory(tmp_path / "sft").evaluations_directory / "after SFT.parquet"
        write_samples(table, [{"id": id_, "prompt": prompt, "verdict": verdict} for id_, prompt, verdict in asked])
    problems = [SimpleNamespace(example=SimpleNamespace(id=id_, prompt_text=f"{id_.upper()}?")) for id_ in "ab"]
    of_run = SimpleNamespace(
        _run=SimpleNamespace(directory=RunDirectory(tmp_path)),
        _problems=SimpleNamespace(problems=problems),
        _session=SimpleNamespace(pool=Judges()),
        _after_sft=after_sft,
    )
    assert HeldOut.was_asked_before(of_run) is not again  # type: ignore[arg-type]
