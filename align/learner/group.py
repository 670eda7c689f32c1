"""The learner ranks together: one logical learner of one policy."""

import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from align.config import LearnerOptions, ModelOptions
from align.errors import UserError
from align.learner.batch import TrainingSequence, split_over_ranks
from align.learner.objective import Objective, Sums
from align.learner.worker import LearnerWorker, environment


class LearnerError(Exception):
    """A learner rank failed or did not answer in time."""


class LearnerGroup:
    """DeepSpeed learners as Ray actors, data parallel."""

    def __init__(
        self,
        model: ModelOptions,
        options: LearnerOptions,
        *,
        seed: int,
        reference: ModelOptions | None = None,
    ):
        """Start the ranks and load the policy in each (Ray must be running). Raises LearnerError, UserError."""
        import ray

        self._options = options
        if options.port is not None:
            check_port(options.port)
        gpus = 1 if torch.cuda.is_available() else 0
        self._ranks = [
            ray.remote(
                num_cpus=0,
                num_gpus=gpus,
                max_restarts=0,
                runtime_env={"env_vars": environment(rank, options.ranks, options.threads)},
            )(LearnerWorker).remote(model, options)
            for rank in range(options.ranks)
        ]
        self._starting = (seed, reference)
        self.parameters = 0

    def wait_until_ready(self) -> None:
        """Join the ranks and load the policy; returns when all are ready to train."""
        start = self._options.start_timeout_s
        master = self._gather([self._ranks[0].address.remote()], start, "starting")[0]
        port = self._options.port or self._gather([self._ranks[0].free_port.remote()], start, "starting")[0]
        setups = [rank.setup.remote(master, port, *self._starting) for rank in self._ranks]
        self.parameters = self._gather(setups, start, "loading the policy")[0]

    def accumulate(self, sequences: Sequence[TrainingSequence], objective: Objective) -> Sums:
        """Forward and backward over a batch; its gradient waits for `apply`."""
        work, _ = split_over_ranks(sequences, self._options.micro_batch_tokens, self._options.ranks)
        calls = [r.accumulate.remote(part, objective) for r, part in zip(self._ranks, work, strict=True)]
        total = Sums()
        for sums in self._gather(calls, self._options.step_timeout_s, "computing gradients"):
            total.add(sums)
        return total

    def apply(self, learning_rate: float) -> float:
        """One optimizer update. Returns the norm of the whole gradient, before clipping."""
        calls = [rank.apply.remote(learning_rate) for rank in self._ranks]
        return float(self._gather(calls, self._options.step_timeout_s, "updating the weights")[0])

    def log_probs(self, sequences: Sequence[TrainingSequence], temperature: float) -> list[npt.NDArray[np.float32]]:
        """The policy's log-probabilities [completion length] of each completion."""
        work, plan = split_over_ranks(sequences, self._options.micro_batch_tokens, self._options.ranks)
        calls = [r.log_probs.remote(part, temperature) for r, part in zip(self._ranks, work, strict=True)]
        results: dict[int, npt.NDArray[np.float32]] = {}
        answers = self._gather(calls, self._options.step_timeout_s, "computing log-probabilities")
        for indices, values in zip(plan, answers, strict=True):
            for micro_batch, rows in zip(indices, values, strict=True):
                results |= dict(zip(micro_batch, rows, strict=False))
        return [results[i] for i in range(len(sequences))]

    def weights(self) -> dict[str, torch.Tensor]:
        """The whole policy under checkpoint names, on the CPU."""
        calls = [rank.weights.remote() for rank in self._ranks]
        weights: dict[str, torch.Tensor] = self._gather(calls, self._options.step_timeout_s, "gathering the weights")[0]
        return weights

    def missing_gradients(self) -> list[str]:
        """Parameters, and experts of fused ones, that no rank has seen a gradient of yet."""
        calls = [rank.missing_gradients.remote() for rank in self._ranks]
        missing = self._gather(calls, self._options.step_timeout_s, "looking at gradients")
        return [name for name in missing[0] if all(name in names for names in missing[1:])]

    def save(self, directory: Path) -> None:
        """Write the policy as a Hugging Face checkpoint."""
        calls = [rank.save.remote(directory.absolute()) for rank in self._ranks]
        self._gather(calls, self._options.step_timeout_s, "saving")

    def close(self) -> None:
        """End the ranks' processes."""
        import ray

        for rank in self._ranks:
            ray.kill(rank)
        self._ranks = []

    def _gather(self, references: Sequence[Any], timeout_s: float, doing: str) -> list[Any]:
        import ray

        try:
            results: list[Any] = ray.get(list(references), timeout=timeout_s)
        except ray.exceptions.GetTimeoutError:
            raise LearnerError(f"the learner ranks were not done {doing} within {timeout_s:g} s") from None
        except ray.exceptions.RayTaskError as error:
            cause = error.as_instanceof_cause()
            if isinstance(cause, UserError):
                raise cause from None
            raise LearnerError(f"a learner rank failed {doing}:\n{error}") from None
        except ray.exceptions.RayActorError as error:
            raise LearnerError(f"a learner rank died {doing}: {error}") from None
        return results


def check_port(port: int) -> None:
    """Raise UserError when something listens on the port already."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UserError(
                f"learner.port: {port} cannot be used ({error.strerror}); give another, or leave it out for a free one"
            ) from None
