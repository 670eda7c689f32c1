"""The rollout workers together: prompts in, groups of completions out as they finish."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from rollout.engine import Request
from rollout.seeds import sample_seed
from rollout.types import Completion, EngineOptions, FleetOptions, Prompt, RolloutError, SamplingOptions
from rollout.worker import RolloutWorker, environment


@dataclass(frozen=True, slots=True)
class Group:
    """A prompt and its completions, by index."""

    prompt: Prompt
    completions: Sequence[Completion]


class Fleet:
    """Rollout workers as Ray actors, each with a copy of the policy.

    The sequences of a call are cut into engine batches before anything is known of the workers, and each batch is
    sampled as a whole by one of them. So what comes back is the same, to the last bit, for any number of workers and
    whichever served a batch.
    """

    def __init__(self, model: str, dtype: str, options: FleetOptions, stop_token_ids: Sequence[int]):
        """Start the workers and load `model` in each (Ray must be running). Raises RolloutError."""
        import ray

        self._options = options
        engine = EngineOptions.model_validate(options.model_dump(include=set(EngineOptions.model_fields)))
        actor = ray.remote(
            num_cpus=0,
            num_gpus=options.tensor_parallel if torch.cuda.is_available() else 0,
            resources=options.resources,
            runtime_env={"env_vars": environment(options.threads)},
            max_restarts=0,
        )(RolloutWorker)
        self._workers = [
            actor.remote(model, dtype, engine, options.threads, list(stop_token_ids)) for _ in range(options.workers)
        ]
        self.weight_version = 0

    def wait_until_ready(self) -> None:
        """Return when every worker has loaded the policy."""
        self._gather([w.ready.remote() for w in self._workers], self._options.start_timeout_s, "loading the policy")

    def generate(
        self, prompts: Sequence[Prompt], group_size: int, sampling: SamplingOptions, *, seed: int, step: int
    ) -> Iterator[Group]:
        """Draw `group_size` completions of each prompt; yields groups as they finish, in no particular order.

        What is drawn depends on the weights and on (seed, step, prompt id, index). Prompt ids must be distinct.
        """
        requests = [
            Request(prompt, index, sample_seed(seed, step, prompt.id, index))
            for prompt in prompts
            for index in range(group_size)
        ]
        waiting: dict[str, dict[int, Completion]] = {prompt.id: {} for prompt in prompts}
        if len(waiting) != len(prompts):
            raise RolloutError("two prompts of one call have the same id")
        by_id = {prompt.id: prompt for prompt in prompts}
        for completions in self._run(engine_batches(requests, self._options.batch_sequences), sampling):
            for completion in completions:
                waiting[completion.prompt_id][completion.index] = completion
                if len(waiting[completion.prompt_id]) == group_size:
                    group = waiting.pop(completion.prompt_id)
                    yield Group(by_id[completion.prompt_id], [group[index] for index in range(group_size)])

    def load(
        self, named_tensors: Mapping[str, torch.Tensor], version: int, modules: Sequence[str] | None = None
    ) -> None:
        """Give every worker the tensors of a checkpoint as its weights. Raises WeightUpdateError, RolloutError.

        With `modules`, such as `model.layers.0.self_attn`, they are the tensors of these alone; all else stays as it is.
        """
        import ray

        stored = ray.put(dict(named_tensors))
        loads = [worker.load.remote(stored, version, modules) for worker in self._workers]
        versions = self._gather(loads, self._options.batch_timeout_s, "taking new weights")
        if versions != [version] * len(self._workers):
            raise RolloutError(f"after the update to version {version} the workers hold versions {versions}")
        self.weight_version = version

    def close(self) -> None:
        """End the workers' processes."""
        import ray

        for worker in self._workers:
            ray.kill(worker)
        self._workers = []

    def _run(self, batches: Sequence[Sequence[Request]], sampling: SamplingOptions) -> Iterator[list[Completion]]:
        import ray

        todo = list(reversed(batches))
        idle = list(self._workers)
        running: dict[Any, Any] = {}
        deadlines: dict[Any, float] = {}
        while todo or running:
            while todo and idle:
                worker = idle.pop(0)
                reference = worker.generate.remote(todo.pop(), sampling)
                running[reference] = worker
                deadlines[reference] = time.monotonic() + self._options.batch_timeout_s
            patience = max(min(deadlines[r] for r in running) - time.monotonic(), 0)
            done, _ = ray.wait(list(running), num_returns=1, timeout=patience)
            if not done:
                raise RolloutError(
                    f"a rollout worker did not finish an engine batch within rollout.batch_timeout_s = "
                    f"{self._options.batch_timeout_s:g} s; raise it, or lower rollout.batch_sequences"
                )
            idle.append(running.pop(done[0]))
            del deadlines[done[0]]
            yield self._gather(done, None, "sampling")[0]

    def _gather(self, references: Sequence[Any], timeout_s: float | None, doing: str) -> list[Any]:
        import ray

        try:
            results: list[Any] = ray.get(list(references), timeout=timeout_s)
        except ray.exceptions.GetTimeoutError:
            raise RolloutError(f"the rollout workers were not done {doing} within {timeout_s:g} s") from None
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, RolloutError):
                raise error.cause from None
            raise RolloutError(f"a rollout worker failed {doing}:\n{error}") from None
        except ray.exceptions.RayActorError as error:
            raise RolloutError(f"a rollout worker died {doing}: {error}") from None
        return results


def engine_batches(requests: Sequence[Request], largest: int) -> list[Sequence[Request]]:
    """Cut requests into the fewest batches of at most `largest`, of sizes that differ by one at most."""
    count = -(-len(requests) // largest)
    bounds = [len(requests) * i // count for i in range(count + 1)] if count else []
    return [requests[start:end] for start, end in pairwise(bounds)]
