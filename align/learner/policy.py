"""One learner rank of a policy."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from align.learner.balance import Balance, BalanceLosses
from align.learner.batch import (
    Batch,
    TrainingSequence,
    collate,
    collate_after_prompts,
    experts_of,
    prompts_routed_otherwise,
    sampled_values,
)
from align.learner.experts import ExpertCounter, Loads
from align.learner.loading import load_from_rank_0
from align.learner.objective import LogProbs, Objective, Sums, loss_and_sums
from align.learner.rank import LearnerRank, Trained
from align.learner.routing import Changes, RoutingReplay
from align.model.policy import load_policy
from align.recipe import ModelOptions
from rollout import Precision
from rollout.parts import Distance, compared
from rollout.types import Experts

MicroBatches = list[list[TrainingSequence]]


def pad_id_of(tokenizer: Any) -> int:
    """What rows are filled up with behind their ends, where no token sees it: the tokenizer's padding or end, or else its first token."""
    pad = tokenizer.pad_token_id
    end = tokenizer.eos_token_id if pad is None else pad
    return 0 if end is None else int(end)


class PolicyRank(LearnerRank):
    """A rank that trains a policy on the log-probabilities of completions."""

    @property
    def _network(self) -> Any:
        return self._engine.module.policy

    def setup(
        self, master: str, port: int, seed: int, reference: ModelOptions | None, teacher: ModelOptions | None = None
    ) -> Trained:
        """Join the other ranks and load the policy, and the frozen reference and the teacher of a distillation where there are any."""
        self._join(master, port, seed)
        self._pad_id = pad_id_of(self._tokenizer)
        policy = self._with_adapter(load_from_rank_0(partial(load_policy, self._model), self._device), "CAUSAL_LM")
        trained = self._start_engine(LogProbs(policy), policy)
        self._checkpointed = checkpoint_in_every_mode(policy)
        self._reference, self._teacher = self._frozen_policy(reference), self._frozen_policy(teacher)
        self._watch(policy)
        self._settle()
        return trained

    def _watch(self, policy: Any) -> None:
        """Listen to the routers of the policy."""
        self._routing, self._expert_counter = RoutingReplay(policy), ExpertCounter(policy)
        self._balance = BalanceLosses(policy, self._options.balance)

    def accumulate(
        self, micro_batches: MicroBatches, objective: Objective, replays: bool = False, batch_size: int = 1
    ) -> Sums:
        """Forward and backward passes of this rank's micro-batches, of a batch of `batch_size` sequences on all ranks; gradients add up until `apply`.

        For GRPO and DPO without dropout, and whatever else is random in training alone: the policy that sampled, and the reference, have none.
        Where it `replays`, tokens go through the experts that their sequences have.
        """
        total = Sums()
        self._engine.train(objective.is_supervised)
        for layer in self._checkpointed:
            layer.training = True
        for sequences in micro_batches:
            batch = self._collate(sequences)
            # First, for where it shares the policy's modules: backward must find them as the policy's forward left them.
            reference = self._frozen_log_probs(
                self._reference if objective.has_reference else None, batch, objective.temperature
            )
            teacher = self._frozen_log_probs(self._teacher, batch, objective.temperature)
            counts = batch.token_counts()
            with self._routing.given(batch.routes, forced=replays), self._balance.watching(counts):
                with self._expert_counter.counting(*counts):
                    log_probs, entropy = self._engine(
                        **batch.inputs, temperature=objective.temperature, with_entropy=objective.grpo is not None
                    )
                loss, sums = loss_and_sums(log_probs, entropy, reference, batch, objective, teacher)
                self._backward(loss + self._balance.loss(batch.prefix_of, batch_size))
            if self._options.share_prompts:
                sums.prompt_routes_changed, sums.prompt_routes = prompts_routed_otherwise(sequences)
            total.add(sums)
        total.routes = [self._routing.take()]
        return total

    def _held(self) -> list[Any]:
        return [*super()._held(), self._reference, self._teacher]

    def take_expert_load(self) -> tuple[Loads, Balance]:
        """Where this rank's tokens went since the last time this was asked, and the balance losses."""
        return self._expert_counter.take(), self._balance.take()

    def take_routes(self) -> Changes:
        """Where the policy would have sent tokens to other experts than those given, since this or `accumulate` last told."""
        return self._routing.take()

    def _collate(self, sequences: list[TrainingSequence]) -> Batch:
        together = collate_after_prompts if self._options.share_prompts else collate
        return together(sequences, self._pad_id).to(self._device)

    def _frozen_policy(self, model: ModelOptions | None) -> Any:
        """A policy that is computed and not trained; where this rank's is an adapter on it, the same module, and not a second copy."""
        if model is None:
            return None
        if self._options.lora is not None and model == self._model:
            return self._engine.module
        return self._frozen(LogProbs(load_from_rank_0(partial(load_policy, model), self._device)))

    def _frozen_log_probs(self, policy: Any, batch: Batch, temperature: float) -> torch.Tensor | None:
        """Log-probabilities [B, K] of a batch's targets under what `_frozen_policy` returned."""
        if policy is None:
            return None
        is_own = policy is self._engine.module
        off: AbstractContextManager[Any] = self._network.disable_adapter() if is_own else nullcontext()
        with torch.no_grad(), off:
            log_probs: torch.Tensor = policy(**batch.inputs, temperature=temperature)[0]
        return log_probs

    def log_probs(
        self,
        micro_batches: MicroBatches,
        temperature: float,
        replays: bool = False,
        precision: Precision = "model",
        of_reference: bool = False,
    ) -> list[list[npt.NDArray[np.float32]]]:
        """Log-probabilities [S] of the sampled tokens of every sequence, in the shape of the micro-batches, under the policy or the frozen reference.

        Where it `replays`, tokens go through the experts that their sequences have. The weights are those that are sent at `precision`.
        """
        results = []
        with self._as_sent(precision):
            for sequences in micro_batches:
                batch = self._collate(sequences)
                with self._routing.given(batch.routes, forced=replays):
                    results.append(sampled_values(self._values(batch, temperature, of_reference=of_reference), batch))
        return results

    def log_probs_and_experts(
        self, micro_batches: MicroBatches, temperature: float
    ) -> list[list[tuple[npt.NDArray[np.float32], Experts]]]:
        """Log-probabilities [S] of the sampled tokens of each sequence, with the routers' own choice of experts, and these experts [T - 1, layers, k] that the tokens of every sequence went through."""
        results = []
        for sequences in micro_batches:
            batch = self._collate(sequences)
            with self._routing.recording() as passes:
                values = sampled_values(self._values(batch, temperature), batch)
            results.append(list(zip(values, experts_of(batch, passes), strict=True)))
        return results

    def part_distances(
        self, sequence: TrainingSequence, noted: Mapping[str, torch.Tensor], precision: Precision = "model"
    ) -> tuple[dict[str, Distance], npt.NDArray[np.float32]]:
        """How far this rank's parts are from what the sampler's computed for a sequence, and its log-probabilities [S] after these.

        The routers choose for themselves; the weights are those that are sent at `precision`.
        """
        batch = collate([sequence], self._pad_id).to(self._device)
        with self._as_sent(precision), compared(self._base, noted) as found:
            (values,) = sampled_values(self._values(batch, 1.0), batch)
        return found, values

    def _values(self, batch: Batch, temperature: float, *, of_reference: bool = False) -> torch.Tensor:
        """Log-probabilities [B, K] of a batch's targets, without a gradient."""
        self._engine.eval()
        if of_reference:
            frozen = self._frozen_log_probs(self._reference, batch, temperature)
            assert frozen is not None, "the learner has no reference"
            return frozen
        with torch.no_grad():
            values: torch.Tensor = self._engine(**batch.inputs, temperature=temperature)[0]
        return values


class FrugalRank(PolicyRank):
    """A rank that holds the weights of a policy and nothing beside them: alone, and for a learner that is thrown away.

    There is no optimizer. `accumulate` itself changes each parameter by `RATE` against the sign of its gradient, as AdamW's first step at
    that learning rate would, as soon as the gradient is there, which is then dropped.
    """

    RATE = 1e-3

    def setup(
        self, master: str, port: int, seed: int, reference: ModelOptions | None, teacher: ModelOptions | None = None
    ) -> Trained:
        """Load the policy. A reference or a teacher would be a second one: there is none."""
        self._join(master, port, seed)
        self._pad_id = pad_id_of(self._tokenizer)
        self._engine = Weights(LogProbs(load_policy(self._model).to(self._device)))
        for parameter in self._network.parameters():
            parameter.register_post_accumulate_grad_hook(self._change)
        self._reference = self._teacher = None
        self._checkpointed = []
        self._watch(self._network)
        self._lost = self._exact = 0.0
        return self._what_is_trained()

    def apply(self, learning_rate: float) -> float:
        """Do nothing: `accumulate` has changed the weights. Returns 0, for the norm of what is left to be applied."""
        return 0.0

    @torch.no_grad()
    def _change(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            parameter.sub_(parameter.grad.sign_(), alpha=self.RATE)
        parameter.grad = None


class Weights(torch.nn.Module):
    """What a rank asks of DeepSpeed's engine, of a module that is not trained by one."""

    global_rank = 0

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.module = module

    def forward(self, **inputs: Any) -> Any:
        """What the module computes."""
        return self.module(**inputs)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of `loss`."""
        loss.backward()


def checkpoint_in_every_mode(network: torch.nn.Module) -> list[torch.nn.Module]:
    """Let gradient checkpointing work outside training mode too; returns the layers that must then say that they train.

    transformers' layers checkpoint only where `training` is true, which switches dropout on as well. From here on a layer's
    forward pass has the mode of its parts, whatever the layer says to whoever calls it.
    """
    layers = [layer for layer in network.modules() if getattr(layer, "gradient_checkpointing", False)]
    for layer in layers:
        layer.register_forward_pre_hook(as_its_parts)
        layer.register_forward_hook(as_training, always_call=True)  # a recomputation ends in an exception
    return layers


def as_its_parts(layer: torch.nn.Module, _: Any) -> None:
    layer.training = any(part.training for part in layer.children())


def as_training(layer: torch.nn.Module, *_: Any) -> None:
    layer.training = True
