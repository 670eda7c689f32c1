"""What the tests of the hooks share: the nano policy as a checkpoint, a real fleet of it, and one that is scripted."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from align.evaluate.hooks import PolicyCheckpoint
from align.model.policy import load_tokenizer, stop_token_ids
from align.recipe import ModelOptions
from rollout import FinishReason, Fleet, FleetOptions, Group, Prompt, SamplingOptions, Trajectory

MAX_LENGTH = 512


@dataclass
class ScriptedFleet:
    """Answers each prompt by a function of its text, one after the other and the last one first."""

    tokenizer: Any
    answer: Callable[[str], str]
    calls: list[SamplingOptions]
    weight_version: int = 0

    def sample(
        self, prompts: Sequence[Prompt], group_size: int, sampling: SamplingOptions, *, seed: int, step: int
    ) -> Iterator[Group]:
        self.calls.append(sampling)
        for prompt in reversed(prompts):
            text = self.tokenizer.decode(list(prompt.token_ids), skip_special_tokens=True)
            ids = [*self.tokenizer(self.answer(text), add_special_tokens=False)["input_ids"], 1]
            cut = len(ids) > sampling.max_new_tokens
            ids = ids[: sampling.max_new_tokens]
            reason = FinishReason.LENGTH if cut else FinishReason.STOP
            log_probs = [0.0] * len(ids)
            yield Group(prompt, [Trajectory.of_one_turn(prompt, 0, ids, log_probs, reason, seed=seed)])


@pytest.fixture(scope="session")
def checkpoint(policy: ModelOptions) -> PolicyCheckpoint:
    """The nano policy with random weights."""
    return PolicyCheckpoint(policy, load_tokenizer(policy.path), MAX_LENGTH)


@pytest.fixture
def scripted(checkpoint: PolicyCheckpoint) -> Callable[[Callable[[str], str]], Any]:
    """Makes a fleet that answers by a function of the prompt's text."""
    return lambda answer: ScriptedFleet(checkpoint.tokenizer, answer, [])


@pytest.fixture(scope="module")
def nano_fleet(policy: ModelOptions, ray_session: None) -> Iterator[Fleet]:
    """A real rollout worker that holds the nano policy."""
    options = FleetOptions(workers=1, max_length=MAX_LENGTH, kv_cache_gb=0.25, batch_sequences=16)
    fleet = Fleet(policy.path, policy.dtype, options, stop_token_ids(policy, load_tokenizer(policy.path)))
    fleet.wait_until_ready()
    yield fleet
    fleet.close()
