"""What Chat SFT learns from an example, what it gives its learner, and when it looks at what came of it."""

from typing import Any

import pytest

from align.data.drawing import items_of_step
from align.data.types import Example, Message
from align.errors import UserError
from align.learner.objective import learning_rate
from align.model.policy import load_tokenizer
from align.stages.sft import encode_demonstration

SMALL = ("sft.steps=4", "sft.sequences_per_step=4", "sft.validation_limit=2")


def test_a_step_is_a_mean_over_the_completion_tokens_of_its_sequences(train: Any) -> None:
    stage = train("sft", *SMALL)
    for batch in stage.learner.batches:
        assert len(batch.sequences) == 4
        assert batch.objective.grpo is None
        assert batch.objective.temperature == 1.0
        tokens = sum(s.sampled_tokens for s in batch.sequences)
        assert [s.weight for s in batch.sequences] == pytest.approx([1 / tokens] * 4)
    for line in stage.steps:  # of which half is padding
        assert line["training_tokens_per_second"] == pytest.approx(2 * line["tokens_per_second"])


def test_each_step_takes_the_sequences_that_seed_and_step_say(train: Any) -> None:
    stage = train("sft", *SMALL, "seed=5")
    for step, batch in enumerate(stage.learner.batches):
        expected = items_of_step(stage.data.sources, seed=5, step=step)
        assert [s.token_ids for s in batch.sequences] == [s.token_ids for s in expected]


def test_the_learning_rate_follows_the_schedule(train: Any) -> None:
    schedule = "learner.optimizer={learning_rate: 1.0e-3, warmup_steps: 2, final_ratio: 0.1}"
    stage = train("sft", *SMALL, schedule)
    expected = [learning_rate(step, 4, stage.recipe.learner.optimizer) for step in range(4)]
    assert [batch.rate for batch in stage.learner.batches] == expected
    assert [line["learning_rate"] for line in stage.steps] == expected
    assert len(set(expected)) == 3


def test_the_validation_loss_is_the_cross_entropy_of_a_token_every_so_many_steps_and_at_the_end(train: Any) -> None:
    stage = train("sft", *SMALL, "sft.validate_every=3")
    assert ["validation_loss" in line for line in stage.steps] == [False, False, True, True]
    assert [(count, temperature) for count, temperature, _ in stage.learner.asked] == [(2, 1.0), (2, 1.0)]
    assert stage.steps[-1]["validation_loss"] > 0


def test_what_never_had_a_gradient_is_told_at_the_end_of_a_short_run(train: Any) -> None:
    stage = train("sft", *SMALL, missing=["model.norm.weight"])
    assert [event["message"] for event in stage.warnings] == [
        "1 trainable parameters or experts have had no gradient in 4 steps: model.norm.weight"
    ]


def test_a_router_that_collapses_is_told(train: Any) -> None:
    loads = [{"experts/layer_1/max_over_mean": load, "experts/layer_1/dead": 0.0} for load in (1.5, 1.5, 2.9, 3.1)]
    [event] = train("sft", *SMALL, "alarms.window=2", loads=loads).warnings
    assert event["alarm"] == "collapse"
    assert event["message"] == (
        "SFT step 4: the router collapses: its busiest expert gets 3.1 times the mean in layer_1 (1.5 in the first steps); "
        "learner.balance.expert evens the load"
    )


def test_the_workers_get_what_was_trained_before_it_is_evaluated(train: Any) -> None:
    stage = train("sft", *SMALL)
    assert stage.fleet.loaded == [(1, 1)]
    assert stage.checked == ["after SFT"]
    assert stage.evaluated == ["before SFT", "after SFT"]
    assert (stage.run.directory.final_directory / "weights").read_text() == "4"


def test_workers_that_hold_what_an_end_had_trained_get_the_weights_of_the_start_again(train: Any) -> None:
    stage = train("sft", *SMALL, weight_version=1)
    assert stage.fleet.loaded == [(1, 0), (2, 1)]


TOKENIZER = load_tokenizer("recipes/nano/policy")


def turn(role: Any, content: str, **more: Any) -> Message:
    return {"role": role, "content": content, **more}


def talk(*weights: float | None) -> Example:
    """Three questions and their answers, "A0" to "A2", with these weights."""
    turns = []
    for number, weight in enumerate(weights):
        given = {} if weight is None else {"weight": weight}
        turns += [turn("user", f"Q{number}"), turn("assistant", f"A{number}", **given)]
    return Example("row 1", tuple(turns[:-1]), turns[-1]["content"], None, "user", conversation=tuple(turns))


def learned(example: Example, **options: Any) -> str:
    """The text of the tokens that are trained on."""
    [sequence] = encode_demonstration(TOKENIZER, example, **options)
    return str(TOKENIZER.decode([id_ for id_, s in zip(sequence.token_ids, sequence.sampled, strict=True) if s]))


END = TOKENIZER.eos_token


def test_all_turns_of_the_assistant_are_trained_on_or_the_last() -> None:
    assert learned(talk(None, None, None)) == f" A0{END} A1{END} A2{END}"
    assert learned(talk(None, None, None), turns="last") == f" A2{END}"


@pytest.mark.parametrize(
    ("weights", "all_turns", "last"), [((0, None, 1), ["A1", "A2"], "A2"), ((1, 1, 0), ["A0", "A1"], "A1")]
)
def test_a_row_says_which_turns_are_not(weights: tuple[float | None, ...], all_turns: list[str], last: str) -> None:
    assert learned(talk(*weights)) == "".join(f" {answer}{END}" for answer in all_turns)
    assert learned(talk(*weights), turns="last") == f" {last}{END}"


def test_a_conversation_without_any_turn_to_train_on_is_named() -> None:
    with pytest.raises(UserError, match="example 'row 1': every turn of the assistant has weight 0"):
        encode_demonstration(TOKENIZER, talk(0, 0))


def test_earlier_turns_of_a_prompt_with_a_response_are_not_trained_on() -> None:
    example = talk(None, None)
    assert learned(Example("row 2", example.messages, "A1", None, "math")) == f" A1{END}"
