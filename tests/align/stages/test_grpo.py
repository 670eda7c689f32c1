"""What a GRPO step makes of its samples, and what the stage does with them: each key of the recipe has its effect."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.data.drawing import items_of_step
from align.errors import AlarmError, UserError
from align.evaluate.agreement import AgreementError, Disagreement
from align.learner.objective import Sums, learning_rate
from align.learner.routing import Routes
from align.recipe import GrpoOptions
from align.run import read_samples
from align.stages.step_metrics import option_metrics

SMALL = ("grpo.steps=2", "grpo.prompts_per_step=2", "grpo.group_size=4", "evaluation.before=false")
REWARDS = ((0.0, 1.0, 1.0, 4.0), (2.0, 2.0, 2.0, 2.0))
"""Of the two prompts' samples: one group from which something can be learnt, and one from which nothing can."""
LENGTHS = (1, 2, 3, 10)


def write(step: int, place: int, index: int) -> Mapping[str, Any]:
    return {"worth": REWARDS[place][index], "tokens": LENGTHS[index], "truncated": index == 3}


def first_batch(stage: Any) -> list[Any]:
    found: list[Any] = stage.learner.batches[0].sequences
    return found


def z_scores(rewards: Sequence[float]) -> list[float]:
    return [(r - np.mean(rewards)) / (np.std(rewards, ddof=1) + 1e-4) for r in rewards]


@pytest.mark.parametrize(
    ("scale", "expected"),
    [("std", z_scores(REWARDS[0])), ("none", [r - np.mean(REWARDS[0]) for r in REWARDS[0]])],
)
def test_advantages_are_of_the_scale_that_the_recipe_names(train: Any, scale: str, expected: list[float]) -> None:
    stage = train("grpo", *SMALL, f"grpo.advantage_scale={scale}", write=write)
    assert [s.advantage for s in first_batch(stage)] == pytest.approx([*expected, 0, 0, 0, 0])


def test_a_sequence_is_the_samplers_tokens_with_the_log_probabilities_that_drew_them(train: Any) -> None:
    stage = train("grpo", *SMALL, write=write)
    for sequence, length in zip(first_batch(stage), LENGTHS * 2, strict=True):
        assert sequence.sampled_tokens == length
        assert list(sequence.token_ids[sequence.prompt_length :]) == [5] * length
        assert list(sequence.sampler_log_probs) == [-0.5] * length
        assert sequence.old_log_probs is None


@pytest.mark.parametrize(
    ("override", "kept"),
    [
        ("grpo.drop_zero_variance_groups=false", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("grpo.drop_zero_variance_groups=true", [0, 1, 2, 3]),
        ("grpo.train_on_truncated=false", [0, 1, 2, 4, 5, 6]),
    ],
)
def test_what_the_recipe_leaves_out_is_neither_trained_on_nor_in_a_denominator(
    train: Any, override: str, kept: list[int]
) -> None:
    stage = train("grpo", *SMALL, override, write=write)
    batch = first_batch(stage)
    assert [s.sampled_tokens for s in batch] == [LENGTHS[i % 4] for i in kept]
    assert [s.weight * s.sampled_tokens for s in batch] == pytest.approx([1 / len(kept)] * len(kept))
    assert stage.steps[0]["trained_on"] == len(kept) / 8


@pytest.mark.parametrize(
    ("aggregation", "weight"),
    [
        ("sample_mean", lambda length: 1 / (8 * length)),
        ("token_mean", lambda length: 1 / (2 * sum(LENGTHS))),
        ("sequence_sum", lambda length: 1 / 8),
        ("constant_length", lambda length: 1 / (8 * 48)),
    ],
)
def test_tokens_weigh_what_the_aggregation_says(train: Any, aggregation: str, weight: Callable[[int], float]) -> None:
    stage = train("grpo", *SMALL, f"grpo.aggregation={aggregation}", write=write)
    assert [s.weight for s in first_batch(stage)] == pytest.approx([weight(length) for length in LENGTHS * 2])


def test_rewards_are_compared_with_the_baseline_that_the_recipe_names(train: Any) -> None:
    stage = train("grpo", *SMALL, "grpo.advantage_scale=none", "grpo.baseline=leave_one_out", write=write)
    expected = [reward - (sum(REWARDS[0]) - reward) / 3 for reward in REWARDS[0]]
    assert [s.advantage for s in first_batch(stage)] == pytest.approx([*expected, 0, 0, 0, 0])


def test_the_metrics_of_a_correction_are_shares_of_the_tokens(train: Any) -> None:
    weights = [0.0, 0.0, 0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    sums = Sums(
        tokens=8,
        correction_cut=3,
        correction_masked=2,
        correction_weights=sum(weights),
        correction_squares=sum(w * w for w in weights),
    )
    options = GrpoOptions(steps=1, prompts_per_step=1, group_size=2, correction={"kind": "tis"})  # type: ignore[arg-type]
    assert option_metrics(options, None, sums) == {  # type: ignore[arg-type]
        "correction/cut": 3 / 8,
        "correction/masked": 2 / 8,
        "correction/effective_sample_size": pytest.approx(81 / (8 * 15.5)),
    }
    everything_masked = option_metrics(options, None, Sums(tokens=8, correction_masked=8))  # type: ignore[arg-type]
    assert everything_masked["correction/effective_sample_size"] == 0
    with_reference = options.model_copy(update={"kl_coefficient": 0.1})
    assert option_metrics(with_reference, None, Sums(tokens=8, kl=2.0))["kl"] == 0.25  # type: ignore[arg-type]
    stage = train("grpo", *SMALL)
    assert "kl" not in stage.steps[0]
    assert [name for name in stage.steps[0] if name.startswith(("correction/", "refill/", "skipped_samples"))] == []


TEACHER = "grpo.distill={teacher: recipes/nano, weight: 0.5}"
ALONE = ("grpo.steps=1", "grpo.prompts_per_step=4", "grpo.group_size=1", "evaluation.before=false", TEACHER)


@pytest.fixture
def any_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align.recipe.load.check_model_directory", lambda *_: None)


@pytest.mark.usefixtures("any_teacher")
def test_a_teacher_is_learned_from_without_rewards(train: Any) -> None:
    stage = train("grpo", *ALONE, "rewards=[]", "evaluation.samples=4", "evaluation.limit=4")
    assert stage.learner.teacher.path == str(NANO)
    batch = first_batch(stage)
    assert [(s.advantage, s.weight * s.sampled_tokens) for s in batch] == [(0, pytest.approx(1 / 4))] * 4
    [line] = stage.steps
    assert (line["distill/kl"], line["trained_on"], line["bad_samples"]) == (0.25, 1, 0)
    assert line.keys() & {"reward", "reward_std", "accuracy", "zero_variance_groups"} == set()
    assert stage.warnings == []
    rows = read_samples(stage.run.directory.samples_file(1))
    assert [(row["trained_on"], row["reward"], row["verdict"]) for row in rows] == [(True, None, "unscored")] * 4


@pytest.mark.usefixtures("any_teacher")
def test_rewards_of_weight_0_measure_what_a_teacher_alone_teaches(train: Any) -> None:
    measured = "rewards=[{name: exact_answer, weight: 0}]"
    stage = train("grpo", *ALONE, measured, "grpo.group_size=2", write=lambda *_: {"worth": 1.0})
    [line] = stage.steps
    assert (line["accuracy"], line["reward/exact_answer"], line["trained_on"]) == (1, 1, 1)
    assert line.keys() & {"reward", "reward_std", "zero_variance_groups"} == set()
    assert stage.warnings == []


@pytest.mark.usefixtures("any_teacher")
def test_beside_rewards_a_teacher_leaves_advantages_as_they_are(train: Any) -> None:
    stage = train("grpo", *SMALL, TEACHER, write=write)
    assert [s.advantage for s in first_batch(stage)] == pytest.approx([*z_scores(REWARDS[0]), 0, 0, 0, 0])
    assert (stage.steps[0]["distill/kl"], stage.steps[0]["reward"]) == (0.25, pytest.approx(14 / 8))
    assert train("grpo", *SMALL, "run.overwrite=true").learner.teacher is None


@pytest.mark.usefixtures("any_teacher")
def test_a_run_does_not_go_on_with_another_teacher(train: Any, tmp_path: Path) -> None:
    weights = tmp_path / "teacher" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_text("of the teacher")
    given = (*ALONE, "rewards=[]", "grpo.steps=3", "save_every=1", f"grpo.distill.teacher={weights.parent}")

    def stopped(step: int, place: int, index: int) -> Mapping[str, Any]:
        if step == 2:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        train("grpo", *given, write=stopped)
    weights.write_text("of another one")
    with pytest.raises(UserError, match="the weights of the teacher"):
        train("grpo", *given)
    weights.write_text("of the teacher")
    assert [call["step"] for call in train("grpo", *given).fleet.calls] == [2]


def test_a_sample_that_nobody_could_judge_is_in_no_mean_and_an_event_of_the_run(train: Any) -> None:
    def masked(step: int, place: int, index: int) -> Mapping[str, Any]:
        return {**write(step, place, index), **({"worth": None} if (place, index) == (0, 3) else {})}

    stage = train("grpo", *SMALL, write=masked)
    expected = z_scores(REWARDS[0][:3])
    assert [s.advantage for s in first_batch(stage)] == pytest.approx([*expected, 0, 0, 0, 0])
    assert stage.steps[0]["reward"] == pytest.approx(10 / 7)
    told = [event for event in stage.warnings if "1 of 8 samples masked" in event["message"]]
    assert len(told) == 2
    assert all(len(event["samples"]) == 1 and event["samples"][0].endswith("#3") for event in told)
    assert all("no sandbox" in event["message"] for event in told)


def test_a_measure_that_is_missing_of_one_sample_is_the_mean_of_the_others(train: Any) -> None:
    def measured(step: int, place: int, index: int) -> Mapping[str, Any]:
        return {"worth": {"exact_answer": float(index), "judge": math.nan if (place, index) == (0, 3) else 2.0}}

    assert train("grpo", *SMALL, write=measured).steps[0]["reward/judge"] == 2.0


@pytest.mark.parametrize("updates", [1, 2])
def test_samples_are_written_with_the_learners_log_probabilities_of_what_was_trained_on(
    train: Any, updates: int
) -> None:
    stage = train("grpo", *SMALL, "grpo.train_on_truncated=false", f"grpo.updates_per_step={updates}", write=write)
    rows = read_samples(stage.run.directory.samples_file(1))
    weights = iter([s.weight for batch in stage.learner.batches[:updates] for s in batch.sequences])
    for place, row in enumerate(rows):
        kept = place % 4 != 3
        assert row["trained_on"] == kept
        expected = [-next(weights)] * LENGTHS[place % 4] if kept else None
        assert row["learner_log_probs"] == (None if expected is None else pytest.approx(expected))


def test_the_objective_is_the_recipes_at_the_samplers_temperature(train: Any) -> None:
    stage = train("grpo", *SMALL, "sampling.temperature=0.7", "grpo.clip_high=0.3")
    for batch in stage.learner.batches:
        assert (batch.objective.grpo, batch.objective.temperature) == (stage.recipe.grpo, 0.7)


def test_several_updates_keep_near_the_policy_that_the_step_began_with(train: Any) -> None:
    stage = train("grpo", *SMALL, "grpo.updates_per_step=2", "sampling.temperature=0.7", write=write)
    assert [len(batch.sequences) for batch in stage.learner.batches] == [4, 4, 4, 4]
    # Once in each step, for all of its sequences, and before the first of its updates.
    assert stage.learner.asked == [(8, 0.7, 0), (8, 0.7, 2)]
    for step in (0, 2):
        sequences = [s for batch in stage.learner.batches[step : step + 2] for s in batch.sequences]
        for number, sequence in enumerate(sequences):
            expected = [-(number + 1) / (place + 1) for place in range(sequence.sampled_tokens)]
            assert list(sequence.old_log_probs) == pytest.approx(expected)
    # Each update has the weights of a mean of its own.
    for batch in stage.learner.batches:
        assert sum(s.weight * s.sampled_tokens for s in batch.sequences) == pytest.approx(1)


NANO = Path(__file__).parents[3] / "recipes/nano"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], None),
        (["grpo.kl_coefficient=0.1"], str(NANO / "policy")),
        (["grpo.kl_coefficient=0.1", "reference=recipes/nano"], str(NANO)),
    ],
)
def test_the_kl_is_to_the_reference_that_the_recipe_names(
    train: Any, overrides: list[str], expected: str | None
) -> None:
    reference = train("grpo", *SMALL, *overrides).learner.reference
    assert (reference and reference.path) == expected


@pytest.mark.parametrize("given", [[], ["grpo.routing_replay=off"], ["grpo.routing_replay=sampler"]])
def test_experts_are_replayed_where_the_recipe_says_so(train: Any, given: list[str]) -> None:
    assert train("grpo", *SMALL, *given).learner.replay == ("sampler" if "sampler" in str(given) else "off")


def test_each_step_is_drawn_with_the_seed_the_step_and_the_weights_of_the_step_before(train: Any) -> None:
    stage = train("grpo", *SMALL, "seed=3", "grpo.steps=3", "sampling.temperature=0.7")
    assert [(call["seed"], call["step"], call["version"]) for call in stage.fleet.calls] == [
        (3, 0, 0),
        (3, 1, 1),
        (3, 2, 2),
    ]
    for step, call in enumerate(stage.fleet.calls):
        assert call["prompts"] == [p.prompt.id for p in items_of_step(stage.data.sources, seed=3, step=step)]
        assert call["sampling"] == stage.recipe.sampling
    assert stage.fleet.loaded == [(1, 1), (2, 2), (3, 3)]
    assert stage.checked == ["before GRPO", "after GRPO"]


def test_the_learning_rate_follows_the_schedule(train: Any) -> None:
    schedule = "learner.optimizer={learning_rate: 1.0e-3, warmup_steps: 2, schedule: cosine}"
    stage = train("grpo", *SMALL, "grpo.steps=4", schedule)
    expected = [learning_rate(step, 4, stage.recipe.learner.optimizer) for step in range(4)]
    assert [batch.rate for batch in stage.learner.batches] == expected
    assert len(set(expected)) == 3


def test_rounded_weights_are_sent_before_anything_is_sampled_and_probed_after_each_sync(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The workers have loaded the policy as it is. A step is judged by the limit of the grid, a probe by that of the dtype."""
    probes: list[int] = []

    def probed(fleet: Any, learner: Any, prompts: Any) -> Disagreement:
        probes.append(fleet.weight_version)
        return Disagreement(mean=2e-3 if len(probes) == 3 else 1e-7, largest=1.0, k3=0.0, tokens=10)

    monkeypatch.setattr("align.stages.held_out.probe", probed)
    with pytest.raises(
        AgreementError, match=r"GRPO step 3, after the weight sync, both with rounded weights: .*1\.0e-03"
    ):
        train("grpo", *SMALL, "grpo.steps=4", "weights.precision=int8", "agreement.stop_mean=0.5", difference=0.2)
    assert probes == [1, 2, 3]


def test_without_rounding_nothing_more_is_sent_or_probed(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for precision, sent in (("model", 2), ("int8", 3)):
        monkeypatch.setattr(
            "align.stages.held_out.probe",
            (lambda *_: Disagreement(1e-7, 1.0, 0.0, 10)) if precision == "int8" else None,
        )
        stage = train("grpo", *SMALL, f"weights.precision={precision}", "run.overwrite=true")
        assert stage.learner.sent == sent
        assert ["sync/mean" in line for line in stage.steps] == [precision == "int8"] * 2
        assert [call["version"] for call in stage.fleet.calls] == [0, 1]


def test_an_alarm_of_a_step_is_an_event_of_the_run(train: Any) -> None:
    stage = train("grpo", *SMALL, write=lambda step, place, index: {"worth": 1.0})
    [event] = stage.warnings
    assert (event["alarm"], len(event["samples"])) == ("variance", 8)


def test_a_step_that_trains_on_nothing_has_no_entropy_and_gives_no_alarm(train: Any) -> None:
    """All completions of the fourth step are truncated, and none of them is trained on."""
    stage = train(
        "grpo",
        *SMALL,
        "grpo.steps=5",
        "grpo.train_on_truncated=false",
        "alarms.window=2",
        write=lambda step, place, index: {"worth": float(index % 2), "truncated": step == 3},
    )
    assert [line["trained_on"] for line in stage.steps] == [1, 1, 1, 0, 1]
    for name in ("entropy", "clip_fraction", "agreement/mean", "agreement/max", "agreement/k3"):
        assert [line[name] == "nan" for line in stage.steps] == [False, False, False, True, False], name
    assert stage.warnings == []
    # Nothing was learnt, and the workers have weights of a version of their own nevertheless.
    assert len(stage.learner.batches) == 4
    assert stage.fleet.weight_version == 5


def test_a_run_that_trains_on_nothing_is_told(train: Any) -> None:
    cut_off = {"worth": 1.0, "truncated": True}
    stage = train(
        "grpo",
        *SMALL,
        "grpo.steps=4",
        "grpo.train_on_truncated=false",
        "alarms.window=2",
        write=lambda step, place, index: cut_off | {"worth": float(index % 2)},
    )
    [told] = [event for event in stage.warnings if event["alarm"] == "idle"]
    assert "nothing was trained on in 2 steps" in told["message"]


def test_an_alarm_that_is_to_end_the_run_does_after_a_checkpoint_and_again_when_it_goes_on(
    train: Any, tmp_path: Path
) -> None:
    for last in ("step_00002", "step_00003"):
        with pytest.raises(AlarmError, match="nothing was trained on"):
            train(
                "grpo",
                *SMALL,
                "grpo.steps=4",
                "grpo.train_on_truncated=false",
                "alarms={window: 2, stop: [idle]}",
                write=lambda step, place, index: {"worth": float(index % 2), "truncated": True},
            )
        assert sorted(tmp_path.rglob("checkpoints/step_*"))[-1].name == last


def test_groups_that_could_not_be_judged_are_not_groups_of_equal_rewards(train: Any) -> None:
    stage = train(
        "grpo",
        *SMALL,
        write=lambda step, place, index: {"worth": None if place or step else float(index)},
    )
    assert [line["zero_variance_groups"] for line in stage.steps] == [0.0, "nan"]
    assert [event for event in stage.warnings if "alarm" in event] == []


@pytest.mark.parametrize(
    ("guard", "told"), [("guard={learned: exact_answer, trusted: answer_format, window: 2}", 1), ("guard=null", 0)]
)
def test_a_learned_reward_that_rises_while_the_trusted_one_falls_is_told(train: Any, guard: str, told: int) -> None:
    def parted(step: int, place: int, index: int) -> Mapping[str, Any]:
        noise = 0.01 * index
        return {"worth": {"exact_answer": 0.1 * step + noise, "answer_format": 1 - 0.1 * step + noise}}

    stage = train("grpo", *SMALL, "grpo.steps=4", guard, write=parted)
    assert sum("'exact_answer' rose while 'answer_format' fell" in e["message"] for e in stage.warnings) == told


def test_what_never_had_a_gradient_is_told_after_ten_steps_that_taught_something(train: Any) -> None:
    stage = train("grpo", *SMALL, "grpo.steps=12", missing=["experts.gate_up_proj[3]"])
    told = [event["message"] for event in stage.warnings]
    assert told == ["1 trainable parameters or experts have had no gradient in 10 steps: experts.gate_up_proj[3]"]
    assert stage.learner.asked_for_missing == 1


def test_a_sampler_of_other_log_probabilities_stops_the_run_before_the_update(train: Any) -> None:
    with pytest.raises(AgreementError, match=r"GRPO step 1: sampler and learner differ by 5\.0e-01(.|\n)*Where: "):
        train("grpo", *SMALL, difference=0.5)


def test_of_several_updates_the_first_alone_is_asked_for_the_samplers_routes(train: Any) -> None:
    same, other = ({1: Routes(known=100, changed=changed, undecided=0, fell_back=0)} for changed in (0, 1))
    with pytest.raises(AgreementError, match=r"step 2: the learner sends 1 of 100 tokens of layer 1 to other experts"):
        train("grpo", *SMALL, write=write, routes=[same, other])
    once = ("run.overwrite=true", "grpo.updates_per_step=2", "grpo.steps=1")
    stage = train("grpo", *SMALL, *once, routes=[same, other])
    assert [line["routing/changed"] for line in stage.steps] == [1 / 200]


def test_it_is_evaluated_before_after_and_every_so_many_steps(train: Any) -> None:
    stage = train("grpo", *SMALL, "grpo.steps=5", "evaluation.every=2", "evaluation.before=true")
    assert stage.evaluated == ["before GRPO", "GRPO step 2", "GRPO step 4", "after GRPO"]


def test_a_run_that_goes_on_samples_with_the_weights_and_the_version_that_it_had(train: Any) -> None:
    def stopped(step: int, place: int, index: int) -> Mapping[str, Any]:
        if step == 3:
            raise KeyboardInterrupt
        return {"worth": float(index % 2)}

    with pytest.raises(KeyboardInterrupt):
        train("grpo", *SMALL, "grpo.steps=5", "save_every=2", write=stopped)
    stage = train("grpo", *SMALL, "grpo.steps=5", "save_every=2")
    assert [(call["step"], call["version"]) for call in stage.fleet.calls] == [(2, 2), (3, 3), (4, 4)]
    assert [line["step"] for line in stage.steps] == [1, 2, 3, 4, 5]
    assert stage.fleet.loaded == [(1, 2), (2, 3), (3, 4), (4, 5)]
