"""Groups without variance in a GRPO step: replaced by groups of further prompts, or not computed."""

from collections.abc import Mapping
from typing import Any

import pytest

from align.data.drawing import items_of_step, refill_of_step
from align.run import read_samples


class Teaches:
    """Writes samples of a step whose n-th group has variance where n is in `groups`; a call's groups are written from the last to the first."""

    def __init__(self, *groups: int):
        self.groups, self.written = groups, dict[int, int]()

    def __call__(self, step: int, place: int, index: int) -> Mapping[str, Any]:
        number = self.written.setdefault(step, 0) // 4
        self.written[step] += 1
        return {"worth": float(index % 2) if number in self.groups else 1.0}


REFILL = ("grpo.steps=3", "grpo.prompts_per_step=4", "grpo.group_size=4", "evaluation.before=false", "seed=3")


def test_groups_without_variance_are_replaced_by_groups_of_further_prompts(train: Any) -> None:
    """Of places 3, 2, 1, 0 the outer two teach something; of 2 and 1 in the first round the latter; of 2 in the second it does not."""
    stage = train("grpo", *REFILL, "grpo.refill_rounds=2", write=Teaches(0, 3, 5))
    assert [len(call["prompts"]) for call in stage.fleet.calls] == [4, 2, 1] * 3
    for step in range(3):
        calls = stage.fleet.calls[3 * step : 3 * step + 3]
        assert {(call["seed"], call["step"], call["version"]) for call in calls} == {(3, step, step)}
        rounds = [refill_of_step(stage.data.sources, seed=3, step=step, round=number) for number in (1, 2)]
        asked = [p.prompt.id for p in items_of_step(stage.data.sources, seed=3, step=step)]
        assert [call["prompts"] for call in calls] == [
            asked,
            [rounds[0][place].prompt.id for place in (1, 2)],
            [rounds[1][2].prompt.id],
        ]
        assert len({prompt for call in calls for prompt in call["prompts"]}) == 7
        rows = read_samples(stage.run.directory.samples_file(step + 1))
        places = [asked[0], calls[1]["prompts"][0], calls[2]["prompts"][0], asked[3]]
        assert [row["id"] for row in rows[::4]] == [*places, asked[1], asked[2], calls[1]["prompts"][1]]
        assert [row["trained_on"] for row in rows] == [True] * 16 + [False] * 12
        batch = stage.learner.batches[step].sequences
        assert [s.weight * s.sampled_tokens for s in batch] == pytest.approx([1 / 16] * 16)
        assert [s.advantage != 0 for s in batch[::4]] == [True, True, False, True]
        line = stage.steps[step]
        assert line["reward"] == pytest.approx((3 * 0.5 + 4) / 7)
        assert (line["accuracy"], line["zero_variance_groups"]) == pytest.approx(((3 * 0.5 + 4) / 7, 4 / 7))
        assert (line["refill/replaced"], line["refill/with_variance"]) == (3, 0.75)
        assert 0 < line["refill/seconds"] < line["step_seconds"]
    [told] = [event for event in stage.warnings if event["alarm"] == "refill"]
    assert "in 25% of the groups all rewards are still equal" in told["message"]


def test_a_step_is_sampled_once_where_every_group_has_variance(train: Any) -> None:
    stage = train("grpo", *REFILL, "grpo.refill_rounds=2", write=Teaches(0, 1, 2, 3))
    assert [len(call["prompts"]) for call in stage.fleet.calls] == [4, 4, 4]
    assert [(line["refill/replaced"], line["refill/with_variance"]) for line in stage.steps] == [(0, 1)] * 3


def test_a_run_that_goes_on_is_refilled_as_if_it_had_not_been_stopped(train: Any) -> None:
    class Stopped(Teaches):
        def __call__(self, step: int, place: int, index: int) -> Mapping[str, Any]:
            if step == 2 and self.written.get(2, 0) > 16:
                raise KeyboardInterrupt  # in its first round of refill
            return super().__call__(step, place, index)

    with pytest.raises(KeyboardInterrupt):
        train("grpo", *REFILL, "grpo.refill_rounds=2", "save_every=2", write=Stopped(0, 3, 5))
    stage = train("grpo", *REFILL, "grpo.refill_rounds=2", "save_every=2", write=Teaches(0, 3, 5))
    assert [call["step"] for call in stage.fleet.calls] == [2, 2, 2]
    asked = [p.prompt.id for p in items_of_step(stage.data.sources, seed=3, step=2)]
    further = refill_of_step(stage.data.sources, seed=3, step=2, round=1)
    assert stage.fleet.calls[0]["prompts"] == asked
    assert stage.fleet.calls[1]["prompts"] == [further[1].prompt.id, further[2].prompt.id]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("updates", "groups", "computed"),
    [
        (1, (0,), [[12, 13, 14, 15]]),  # 400 tokens of the last place, and no other
        (1, (), [[0, 1, 2]]),  # 300 tokens for the gate alone
        (2, (0,), [[0, 1, 2], [12, 13, 14, 15]]),
    ],
)
def test_samples_that_teach_nothing_are_skipped_but_for_what_the_gate_compares(
    train: Any, updates: int, groups: tuple[int, ...], computed: list[list[int]]
) -> None:
    def long(step: int, place: int, index: int) -> Mapping[str, Any]:
        return {**teaches(step, place, index), "tokens": 100}

    teaches = Teaches(*groups)
    stage = train(
        "grpo", *REFILL, "grpo.steps=1", f"grpo.updates_per_step={updates}", "grpo.skip_zero_gradient=true", write=long
    )
    assert len(stage.learner.batches) == updates  # each with its update of the weights
    rows = read_samples(stage.run.directory.samples_file(1))
    assert [row["trained_on"] for row in rows] == [True] * 16
    known = [place for place, row in enumerate(rows) if row["learner_log_probs"] is not None]
    assert known == [place for batch in computed for place in batch]
    assert [len(batch.sequences) for batch in stage.learner.batches] == [len(batch) for batch in computed]
    # The denominators are those of all samples.
    for batch in stage.learner.batches:
        assert [s.weight * s.sampled_tokens for s in batch.sequences] == pytest.approx(
            [updates / 16] * len(batch.sequences)
        )
    assert stage.steps[0]["skipped_samples"] == pytest.approx(1 - sum(map(len, computed)) / 16)
