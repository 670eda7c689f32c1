"""Direct preference optimisation: an update, and what a stage measures of its pairs."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import log_softmax, logsigmoid

from align.data.types import Preference
from align.errors import UserError
from align.learner.batch import PolicyPair, TrainingSequence
from align.learner.group import LearnerGroup
from align.learner.objective import Objective, Sums
from align.losses import DpoLossOptions, dpo_loss
from align.model.policy import load_policy, load_tokenizer
from align.recipe import LearnerOptions, ModelOptions, OptimizerOptions, load_recipe
from align.session.checks import check_names
from align.stages.dpo import Margins, completions_of, encode_pair, margins_of
from align.stages.held_out import HeldOut

SMALL = ("dpo.steps=4", "dpo.pairs_per_step=3", "dpo.validation_limit=2", "learner.optimizer.warmup_steps=1")
TOKENIZER = load_tokenizer("recipes/nano/policy")
NANO = "model={path: recipes/nano/policy, init: random}"
OPTIONS = DpoLossOptions(beta=0.5, sft_weight=0.25)


def pairs(count: int = 2) -> list[PolicyPair]:
    preferences = [
        Preference(
            f"p{n}", ({"role": "user", "content": f"Say {n}."},), f"It is {n}, I think.", f"No {n * 7} at all", "chat"
        )
        for n in range(count)
    ]
    return [pair for one in preferences for pair in encode_pair(TOKENIZER, one)]


def test_the_completions_of_a_pair_are_trained_on_with_their_end_and_share_a_prompt() -> None:
    [pair] = pairs(1)
    for sequence, text in ((pair.chosen, " It is 0, I think."), (pair.rejected, " No 0 at all")):
        sampled = [id_ for id_, s in zip(sequence.token_ids, sequence.sampled, strict=True) if s]
        assert TOKENIZER.decode(sampled) == text + TOKENIZER.eos_token
    assert [(s.group, s.weight) for s in completions_of(pairs(2))] == [(0, 0.5), (0, 0.5), (1, 0.5), (1, 0.5)]


def test_the_loss_is_the_papers_and_pushes_both_completions_equally_hard() -> None:
    chosen = torch.tensor([-30.0, 3.0, 0.0, 400.0], requires_grad=True)
    rejected = torch.tensor([0.0, 1.0, 0.0, 0.0], requires_grad=True)
    loss = dpo_loss(chosen, rejected, 0.3)
    torch.testing.assert_close(loss, -logsigmoid(0.3 * (chosen - rejected)))
    up, down = torch.autograd.grad(loss.sum(), (chosen, rejected))
    torch.testing.assert_close(up, -down)
    torch.testing.assert_close(down, 0.3 * torch.sigmoid(-0.3 * (chosen - rejected)))


def test_a_margin_is_what_the_policy_has_raised_of_the_chosen_less_what_it_has_raised_of_the_rejected(
    train: Any,
) -> None:
    stage = train("dpo", *SMALL)
    lengths = [[s.sampled_tokens for s in batch.sequences] for batch in stage.learner.batches]
    for line, of_batch in zip(stage.steps, lengths, strict=True):
        # The fake learner's log-probabilities, and those of its reference, which are twice as low.
        raised = [(n + 1) * sum(1 / t for t in range(1, length + 1)) for n, length in enumerate(of_batch)]
        margins = torch.tensor(raised[::2]) - torch.tensor(raised[1::2])
        assert line["margin"] == pytest.approx(float(margins.mean()), rel=1e-4)
        assert line["pair_accuracy"] == float((margins > 0).float().mean() + (margins == 0).float().mean() / 2)
        assert line["pair_loss"] == pytest.approx(float(-logsigmoid(0.1 * margins).mean()), rel=1e-4)
    assert {batch.objective.dpo for batch in stage.learner.batches} == {stage.recipe.dpo}


def test_before_a_policy_has_moved_its_pairs_are_as_often_right_as_wrong() -> None:
    found = Margins(torch.tensor([0.0, 0.0, 2.0]), torch.tensor([0.0, 0.0, 1.0])).metrics(0.1)
    assert found["pair_accuracy"] == pytest.approx(2 / 3)


def test_a_policy_that_sft_has_just_asked_the_same_is_not_asked_again(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HeldOut, "was_asked_before", lambda self: True)
    assert train("dpo", *SMALL).evaluated == ["after DPO"]


def test_the_validation_pairs_are_measured_every_so_many_steps_and_at_the_end(train: Any) -> None:
    stage = train("dpo", *SMALL, "dpo.validate_every=3")
    assert ["validation_pair_accuracy" in line for line in stage.steps] == [False, False, True, True]
    assert [(count, batches) for count, _, batches in stage.learner.asked] == [(4, 3), (4, 4)]


def test_the_policy_of_the_start_is_the_reference_and_the_workers_get_what_was_trained(train: Any) -> None:
    stage = train("dpo", *SMALL)
    assert stage.learner.reference == stage.recipe.model
    assert stage.fleet.loaded == [(1, 1)]
    assert (stage.checked, stage.evaluated) == (["after DPO"], ["before DPO", "after DPO"])
    again = train("dpo", *SMALL, "run.overwrite=true", weight_version=1)
    assert again.fleet.loaded == [(1, 0), (2, 1)]


def test_validation_pairs_may_have_prompts_that_are_evaluated_and_training_pairs_may_not(train: Any) -> None:
    stage = train("dpo", *SMALL, "evaluation.split=validation")
    asked = {problem.example.prompt_text for problem in stage.data.problems.problems}
    assert len(stage.data.validation) == 2
    trained = {TOKENIZER.decode(pair.chosen.token_ids) for source in stage.data.sources for pair in source.items}
    assert not any(text in prompt for text in asked for prompt in trained)


def test_rewards_are_for_what_is_answered_and_not_for_the_pairs(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "Hello", "chosen": "Hi.", "rejected": "No."}\n')
    recipe = load_recipe(Path("recipes/nano/dpo.yaml"), [NANO, f"data={{path: {tmp_path / 'pairs.jsonl'}}}"])
    check_names(recipe.data, recipe.data_stage, recipe.roles())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluation.cards=[]"], "no problems for the policy to answer: name cards that have, with evaluation.cards"),
        (["learner.lora={dropout: 0.1}"], "margins are measured without it"),
        (["alarms.stop=[entropy]"], "entropy cannot come here"),
        (["data={card: nano_math}"], "nano_math"),
        (["evaluation.every=2"], "DPO looks at the validation pairs"),
    ],
)
def test_what_a_recipe_cannot_mean_is_refused(overrides: list[str], message: str, train: Any) -> None:
    with pytest.raises(UserError, match=message):
        train("dpo", *SMALL, *overrides)


@pytest.fixture(scope="module")
def moved(policy: ModelOptions, tmp_path_factory: pytest.TempPathFactory) -> ModelOptions:
    """The policy after some training."""
    model, directory = load_policy(policy), tmp_path_factory.mktemp("moved")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.save_pretrained(directory)
    TOKENIZER.save_pretrained(directory)
    return policy.model_copy(update={"path": str(directory)})


@contextmanager
def learner_of(policy: ModelOptions, reference: ModelOptions, **options: Any) -> Iterator[LearnerGroup]:
    optimizer = OptimizerOptions(learning_rate=1e-2, clip_norm=1e9)
    learner = LearnerGroup(policy, LearnerOptions(optimizer=optimizer, **options), seed=0, reference=reference)
    with closing(learner):
        learner.wait_until_ready()
        yield learner


def step(learner: LearnerGroup, found: list[PolicyPair]) -> tuple[Sums, float]:
    sums = learner.accumulate(completions_of(found), Objective(dpo=OPTIONS))
    return sums, learner.apply(1e-2)


def log_prob(model: Any, sequence: TrainingSequence) -> torch.Tensor:
    ids = torch.tensor([sequence.token_ids])
    values = log_softmax(model(input_ids=ids).logits[0, :-1], -1).gather(-1, ids[0, 1:, None])[:, 0]
    return values[torch.tensor(sequence.sampled[1:])].sum()


@pytest.mark.engines
@pytest.mark.parametrize("options", [{}, {"micro_batch_tokens": 1}, {"micro_batch_tokens": 1, "share_prompts": False}])
def test_an_update_is_that_of_the_loss_in_plain_pytorch(
    options: dict[str, Any], policy: ModelOptions, moved: ModelOptions, ray_session: None
) -> None:
    found = pairs(3)
    with learner_of(moved, policy, **options) as learner:
        margins = margins_of(learner, found)
        sums, norm = step(learner, found)
    together = Margins.of(sums.log_probs[0], sums.reference_log_probs[0])
    torch.testing.assert_close(together.values, margins.values, atol=1e-5, rtol=1e-5)
    plain, frozen = load_policy(moved), load_policy(policy)
    loss = torch.zeros(())
    for pair, measured in zip(found, margins.values.tolist(), strict=True):
        with torch.no_grad():
            before = log_prob(frozen, pair.chosen) - log_prob(frozen, pair.rejected)
        chosen = log_prob(plain, pair.chosen)
        margin = chosen - log_prob(plain, pair.rejected) - before
        assert measured == pytest.approx(float(margin), abs=1e-4)
        cross_entropy = -chosen / pair.chosen.sampled_tokens
        loss = loss + (OPTIONS.sft_weight * cross_entropy - logsigmoid(OPTIONS.beta * margin)) / 3
    loss.backward()
    assert sums.loss == pytest.approx(float(loss), rel=1e-4)
    squares = [p.grad.double().square().sum() for p in plain.parameters() if p.grad is not None]
    assert norm == pytest.approx(float(torch.stack(squares).sum().sqrt()), rel=1e-3)


@pytest.mark.engines
def test_of_an_adapter_the_model_below_it_is_the_reference(policy: ModelOptions, ray_session: None) -> None:
    found = pairs(2)
    with learner_of(policy, policy, lora={"rank": 4}) as learner:
        assert margins_of(learner, found).values.tolist() == [0.0, 0.0]
        step(learner, found)
        assert (margins_of(learner, found).values > 0).all()


def test_the_recipe_of_the_nano_model_needs_a_reference_beside_the_policy() -> None:
    roles = load_recipe(Path("recipes/nano/dpo.yaml"), [NANO]).roles()
    assert (roles.trained, roles.reference, roles.margins, roles.trained_sequences) == ("policy", True, True, 64)
