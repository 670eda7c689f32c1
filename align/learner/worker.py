"""One learner rank of a policy."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from align.config import ModelOptions
from align.learner.batch import TrainingSequence, collate
from align.learner.objective import LogProbs, Objective, Sums, loss_and_sums
from align.learner.rank import LearnerRank
from align.model.policy import load_policy

MicroBatches = list[list[TrainingSequence]]


class LearnerWorker(LearnerRank):
    """A rank that trains a policy on the log-probabilities of completions."""

    @property
    def _network(self) -> Any:
        return self._engine.module.policy

    def setup(self, master: str, port: int, seed: int, reference: ModelOptions | None) -> int:
        """Join the other ranks and load the policy, and the frozen reference where there is one.

        Returns the number of trainable parameters.
        """
        self._join(master, port, seed)
        pad = self._tokenizer.pad_token_id
        self._pad_id = self._tokenizer.eos_token_id if pad is None else pad
        policy = load_policy(self._model)
        parameters = self._start_engine(LogProbs(policy), policy)
        self._reference = None
        if reference is not None:
            self._reference = LogProbs(load_policy(reference)).to(self._device).eval().requires_grad_(False)
        self._settle()
        return parameters

    def accumulate(self, micro_batches: MicroBatches, objective: Objective) -> Sums:
        """Forward and backward passes of this rank's micro-batches; gradients add up until `apply`."""
        total = Sums()
        self._engine.train()
        for sequences in micro_batches:
            batch = collate(sequences, self._pad_id).to(self._device)
            log_probs, entropy = self._engine(batch.token_ids, batch.targets, objective.temperature)
            reference = None
            if self._reference is not None:
                with torch.no_grad():
                    reference, _ = self._reference(batch.token_ids, batch.targets, objective.temperature)
            loss, sums = loss_and_sums(log_probs, entropy, reference, batch, objective)
            # DeepSpeed averages the gradients of the ranks; the loss's weights hold the whole batch's denominator.
            self._engine.backward(loss * self._options.ranks)
            total.add(sums)
        return total

    def log_probs(self, micro_batches: MicroBatches, temperature: float) -> list[list[npt.NDArray[np.float32]]]:
        """Log-probabilities [completion length] of every completion, in the shape of the micro-batches."""
        self._engine.eval()
        results = []
        for sequences in micro_batches:
            batch = collate(sequences, self._pad_id).to(self._device)
            with torch.no_grad():
                values, _ = self._engine(batch.token_ids, batch.targets, temperature)
            rows = values.float().cpu().numpy()
            results.append([row[mask] for row, mask in zip(rows, batch.mask.cpu().numpy(), strict=True)])
        return results
