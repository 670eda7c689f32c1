"""The learner ranks together: one logical learner of one model."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError

from align.errors import NonFiniteError, UserError
from align.learner.balance import balance_metrics
from align.learner.batch import (
    TrainingSequence,
    in_order,
    plan_micro_batches,
    rows_after_prompts,
    share_out,
    whole_rows,
)
from align.learner.engine import environment
from align.learner.experts import add_loads, load_metrics
from align.learner.objective import Objective, Sums
from align.learner.policy import PolicyRank
from align.learner.rank import LearnerRank, Trained
from align.learner.routing import Changes
from align.learner.state import WRITTEN_A_SECOND
from align.recipe import LearnerOptions, ModelOptions, Replay
from align.run.checkpoints import Entry
from align.run.files import whole_directory
from align.run.machine import check_port
from rollout import Colocation, Fleet, ObjectStoreSync, Precision, WeightSync, processes
from rollout.parts import Distance
from rollout.processes import ProcessId
from rollout.sync.base import WriteBuckets
from rollout.types import PublisherDiedError, PublishError

START_S = 600.0
DEATH_S = 5.0
"""How long it may take to hear of a rank that died."""


class LearnerError(PublishError):
    """A learner rank failed or did not answer in time; `stacks` is then what the ranks' threads did, as text."""

    stacks = ""


class LearnerDiedError(LearnerError, PublisherDiedError):
    """A learner rank's process is gone."""


class RankGroup:
    """DeepSpeed learners as Ray actors, data parallel, of any model.

    `updates` have begun by now, of which the last `bad_updates` failed. It `is_idle` unless what it was asked for last has not come.
    """

    def __init__(
        self,
        kind: type[LearnerRank],
        model: ModelOptions,
        options: LearnerOptions,
        *setup: Any,
        colocation: Colocation | None = None,
    ):
        """Start the ranks (Ray must be running), on the GPUs of a colocation if given. Raises UserError when the port is in use.

        `setup` is what their method of that name needs besides the place to meet.
        """
        self._options = options
        if options.port is not None and not processes.cluster_address():  # of which rank 0 may be on another node
            check_port(options.port)
        self._ranks = [
            self._start(kind, model, rank, colocation and colocation.placement_group) for rank in range(options.ranks)
        ]
        self._setup = setup
        models = [given.path for given in (model, *setup) if isinstance(given, ModelOptions)]
        self._start_limit_s = processes.start_limit_s(options.start_timeout_s, START_S, *models)
        self._processes: list[ProcessId] = []
        self._stalled = False
        self.updates = self.bad_updates = 0
        self.is_idle = True
        self.trained = Trained("", None)
        self.weight_sync: WeightSync = ObjectStoreSync()
        self.precision: Precision = "model"
        self._colocation = colocation
        self._is_ready = self._is_offloaded = False

    def _start(self, kind: type[LearnerRank], model: ModelOptions, rank: int, placement_group: Any) -> Any:
        """The actor of one rank."""
        import ray

        options = self._options
        gpus = options.gpus if processes.on_gpus() else 0
        variables = environment(rank, options.ranks, options.threads, on_gpu=gpus > 0) | processes.visibility(gpus)
        return ray.remote(
            num_cpus=0,
            num_gpus=gpus,
            resources=options.resources,
            max_restarts=0,
            runtime_env={"env_vars": variables},
            **processes.in_placement_group(placement_group, rank),
        )(kind).remote(model, options)

    def _end(self, rank: Any) -> None:
        import ray

        ray.kill(rank)

    def wait_until_ready(self) -> None:
        """Join the ranks and load the model; returns when all are ready to train. Raises LearnerError, UserError."""
        if self._colocation:
            self._colocation.claim(self)
        start = self._options.start_timeout_s or START_S
        self._processes = self._gather([rank.process.remote() for rank in self._ranks], "starting", start)
        master = self._gather([self._ranks[0].address.remote()], "starting", start)[0]
        port = self._options.port or self._gather([self._ranks[0].free_port.remote()], "starting", start)[0]
        setups = [rank.setup.remote(master, port, *self._setup) for rank in self._ranks]
        self.trained = self._gather(setups, "loading the model", self._start_limit_s)[0]
        self._is_ready = True

    def offload(self) -> None:
        """Let the ranks move what they hold on their GPUs to the CPU's memory."""
        if self._is_ready and not self._is_offloaded:
            self._gather([rank.offload.remote() for rank in self._ranks], "offloading")
            self._is_offloaded = True

    def onload(self) -> None:
        """Let the ranks move what they offloaded back to their GPUs."""
        if self._is_offloaded:
            self._gather([rank.onload.remote() for rank in self._ranks], "onloading")
            self._is_offloaded = False

    def apply(self, learning_rate: float) -> float:
        """One optimizer update. Returns the norm of the whole gradient, before clipping.

        When that is not finite nothing was changed. Raises NonFiniteError when it happens too often in a row.
        """
        ranks = self._at_work()
        self.updates += 1
        calls = [rank.apply.remote(learning_rate) for rank in ranks]
        norm = float(self._gather(calls, "updating the weights")[0])
        self.bad_updates = 0 if math.isfinite(norm) else self.bad_updates + 1
        if self.bad_updates >= self._options.stop_after_bad_steps:
            raise NonFiniteError(
                f"{self.bad_updates} updates in a row had a gradient that is not finite; the weights are as they were before "
                f"them (learner.stop_after_bad_steps: {self._options.stop_after_bad_steps} ends a run)"
            )
        return norm

    def publish(self, write: WriteBuckets, bucket_bytes: float, *, on_device: bool = False) -> list[Any]:
        """Have rank 0 write the trained weights; see `rollout.sync.base.Publisher`. Raises LearnerError, OSError."""
        if not self._ranks:
            raise LearnerDiedError("the learner whose weights are asked for is gone")
        arguments = write, bucket_bytes, on_device, self.precision
        calls = [rank.publish.options(num_returns="streaming").remote(*arguments) for rank in self._at_work()]
        self._gather([call.completed() for call in calls], "gathering the weights")
        return list(calls[0])

    def save_adapter(self, directory: Path) -> None:
        """Write the LoRA adapter alone to `directory`, as PEFT does. Raises LearnerError, OSError."""
        calls = [rank.save_adapter.remote(directory) for rank in self._at_work()]
        self._gather(calls, "gathering the adapter")

    def free_address(self) -> tuple[str, int]:
        """The host of rank 0, and a port that is free there at this moment. Raises LearnerError."""
        calls = [self._ranks[0].address.remote(), self._ranks[0].free_port.remote()]
        host, port = self._gather(calls, "meeting")
        return host, port

    def weights(self) -> dict[str, torch.Tensor]:
        """The trained weights as the rollout workers get them: those that change, under checkpoint names, on the CPU."""
        source = ObjectStoreSync().publish(self)
        return {name: tensor for bucket in source.buckets() for name, tensor in bucket.items()}

    def missing_gradients(self) -> list[str]:
        """Parameters, and experts of fused ones, that no rank has seen a gradient of yet."""
        calls = [rank.missing_gradients.remote() for rank in self._ranks]
        missing = self._gather(calls, "looking at gradients")
        return [name for name in missing[0] if all(name in names for names in missing[1:])]

    def adapter_lost(self) -> float | None:
        """Which part of the adapter's effect was not in what was last sent or saved; see `LearnerRank.adapter_lost`.

        None without an adapter, or where the rollout workers add it exactly as it is trained.
        """
        if self.trained.modules is None or self.weight_sync.keeps_adapter:
            return None
        lost = self._ranks[0].adapter_lost.remote()
        return self._gather([lost], "measuring the adapter")[0]

    def check_shared(self, file: Path) -> None:
        """Raise UserError unless every rank reads in a file of the run what this process reads there: ranks write into its directory."""
        calls = [rank.reads.remote(file.absolute(), file.read_text()) for rank in self._ranks]
        if not all(self._gather(calls, "reading a file of the run")):
            raise UserError(
                f"{file.parent} is not what a learner rank on another node sees there: run.dir must be on a file system that all nodes share"
            )

    def save(self, directory: Path) -> float | None:
        """Write the model as a Hugging Face checkpoint, whole or not at all. Raises LearnerError, OSError.

        Returns which part of an adapter's effect the checkpoint has lost; None without an adapter, or while it has no effect.
        """
        with whole_directory(directory.absolute()) as temporary:
            calls = [rank.save.remote(temporary) for rank in self._at_work()]
            lost: float | None = self._gather(calls, "saving")[0]
            if not (temporary / "config.json").exists():
                raise OSError(
                    f"learner rank 0 wrote the model to {temporary} on its own node, where this process does not see it: "
                    "run.dir must be on a file system that all nodes share"
                )
        return lost

    def save_state(self, directory: Path) -> dict[str, Entry]:
        """Write all that the ranks need to go on exactly; returns the files' entries. Raises LearnerError, OSError."""
        calls = [rank.save_state.remote(directory.absolute()) for rank in self._at_work()]
        parts = self._gather(calls, "saving their state", least_s=self._state_s)
        return {name: entry for part in parts for name, entry in part.items()}

    @property
    def _state_s(self) -> float:
        """Seconds that the ranks' state may take to the disk or back: in bfloat16 float32 masters and moments are six times what is sent."""
        return 7 * self.trained.sent_bytes / WRITTEN_A_SECOND

    def load_state(self, directory: Path) -> None:
        """Go on from what `save_state` wrote. Raises LearnerError, and UserError where it is of another learner."""
        calls = [rank.load_state.remote(directory.absolute()) for rank in self._at_work()]
        self._gather(calls, "loading their state", least_s=self._state_s)

    def close(self) -> None:
        """End the ranks' processes."""
        self._is_ready = self._is_offloaded = False
        if self._colocation:
            self._colocation.release(self)
        for rank in self._ranks:
            self._end(rank)
        if self._stalled:
            # Ray asks first; a rank that is stopped or hung would stay for seconds, with the memory it has.
            for process in self._processes:
                processes.kill(process)
        self._ranks = []

    def _at_work(self) -> list[Any]:
        """The ranks, with their GPUs."""
        if self._colocation:
            self._colocation.claim(self)
        return self._ranks

    def _gather(
        self, references: Sequence[Any], doing: str, start_limit_s: float | None = None, least_s: float = 0.0
    ) -> list[Any]:
        """What the ranks return; within `start_limit_s` seconds where that is given, else within those of a step, or `least_s` where that is more."""
        import ray

        limit_s, key = self._options.step_timeout_s, "learner.step_timeout_s"
        if start_limit_s:
            limit_s, key = start_limit_s, "learner.start_timeout_s"
        elif least_s > limit_s:
            limit_s, key = least_s, f"at {WRITTEN_A_SECOND / 1e9:g} GB a second"
        self.is_idle = False
        try:
            results: list[Any] = ray.get(list(references), timeout=limit_s)
            self.is_idle = True
        except ray.exceptions.GetTimeoutError:
            _, late = ray.wait(list(references), num_returns=len(references), timeout=0)
            who = ", ".join(str(place) for place, reference in enumerate(references) if reference in late)
            why = "" if self._processes else ": no node has free what learner.gpus and learner.resources ask for"
            stalled = LearnerError(f"learner rank {who} was not done {doing} within {limit_s:g} s ({key}){why}")
            stalled.stacks = "\n".join(
                f"rank {n}: {processes.stacks(process)}" for n, process in enumerate(self._processes)
            )
            self._stalled = True
            raise stalled from None
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError | OSError):
                raise error.cause from None
            if isinstance(error.cause, SafetensorError) and "os error" in str(error.cause):
                raise OSError(str(error.cause)) from None
            if self._one_died(references):
                raise LearnerDiedError(f"a learner rank died {doing}, and another failed for it") from None
            raise LearnerError(f"a learner rank failed {doing}:\n{error}") from None
        except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
            raise LearnerDiedError(f"a learner rank died {doing}: {error}") from None
        except ray.exceptions.RayError as error:
            raise LearnerError(f"Ray failed while the learner ranks were {doing}: {error}") from None
        return results

    def _one_died(self, references: Sequence[Any]) -> bool:
        """Whether a rank is gone: the others then fail where they wait for it, and may be heard of first."""
        import ray

        for reference in references:
            try:
                ray.get(reference, timeout=DEATH_S)
            except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError):
                return True
            except (ray.exceptions.RayTaskError, ray.exceptions.GetTimeoutError):
                continue
        return False


class LearnerGroup(RankGroup):
    """The learner of a policy."""

    def __init__(
        self,
        model: ModelOptions,
        options: LearnerOptions,
        *,
        seed: int,
        reference: ModelOptions | None = None,
        weight_sync: WeightSync | None = None,
        colocation: Colocation | None = None,
        kind: type[PolicyRank] = PolicyRank,
        replay: Replay = "off",
        teacher: ModelOptions | None = None,
        precision: Precision = "model",
    ):
        """`reference` is what the KL is measured to, `teacher` what a distillation learns from. `weight_sync` is how `sync_weights` sends the weights, by default through Ray's object store; `kind` is what the ranks are.

        `replay` says whose experts tokens go through in GRPO: those that the sequences have of the sampler, or those of the learner itself
        before the first of several updates. `has_moved` is true after the first of a step's updates until its last: the rollout workers then
        hold other weights. `precision` is the grid that weights are rounded to before they are sent.
        """
        super().__init__(kind, model, options, seed, reference, teacher, colocation=colocation)
        self.weight_sync = weight_sync or self.weight_sync
        self.precision = precision
        self.replay = replay
        self.has_moved = False

    def sync_weights(self, fleet: Fleet, version: int) -> int:
        """Give the rollout workers what has been trained; when this returns they sample with it, as weights of `version`.

        Returns the bytes that went to each worker. Raises LearnerError, OSError, RolloutError.
        """
        source = self.weight_sync.publish(self)
        size = source.sent_bytes or self.trained.sent_bytes
        fleet.load(source, version, self.trained.modules)
        return size

    def accumulate(self, sequences: Sequence[TrainingSequence], objective: Objective) -> Sums:
        """Forward and backward over a batch; its gradient waits for `apply`."""
        work, plan = self._split(sequences, objective.together)
        replays = objective.grpo is not None and self.replay != "off"
        trained = max(1, sum(s.weight > 0 for s in sequences))
        calls = [
            r.accumulate.remote(part, objective, replays, trained)
            for r, part in zip(self._at_work(), work, strict=True)
        ]
        found = self._gather(calls, "computing gradients")
        total = Sums()
        for sums in found:
            total.add(sums)
        total.log_probs = [] if objective.is_supervised else [in_order(plan, [sums.log_probs for sums in found])]
        if objective.dpo is not None:
            total.reference_log_probs = [in_order(plan, [sums.reference_log_probs for sums in found])]
        return total

    def update(
        self,
        updates: Sequence[Sequence[TrainingSequence]],
        objective: Objective,
        learning_rate: float,
        check: Callable[[Sums], object],
    ) -> tuple[Sums, float]:
        """One optimizer update for each batch of `updates`, but for empty ones. Returns their sums, of the loss the mean, and the gradient's norm.

        Of several updates each is clipped against the policy before the first. `check` is called with the sums of each
        batch before its update is applied, and stops it by what it raises; a loss that is not finite is not checked: its
        update is left out anyway. The norm is the last one, but NaN or infinite where any was.
        """
        if len(updates) > 1 and any(updates):
            before = iter(self._before_updates([s for batch in updates for s in batch], objective.temperature))
            updates = [[next(before) for _ in batch] for batch in updates]
        total, norm = Sums(), 0.0
        batches = [batch for batch in updates if batch]
        for number, batch in enumerate(batches):
            sums = self.accumulate(batch, objective)
            self.has_moved = number > 0
            if math.isfinite(sums.loss):
                # Routers that have moved may choose otherwise.
                check(replace(sums, routes=[]) if self.has_moved else sums)
            applied = self.apply(learning_rate)
            norm = applied if math.isfinite(norm) else norm
            total.add(sums)
        self.has_moved = False
        return replace(total, loss=total.loss / max(1, len(batches))), norm

    def expert_load(self) -> dict[str, float]:
        """How evenly the tokens of all `accumulate` since the last time went to the experts, and the balance losses; see `load_metrics`, `balance_metrics`."""
        calls = [rank.take_expert_load.remote() for rank in self._ranks]
        loads, balance = zip(*self._gather(calls, "counting tokens of experts"), strict=True)
        return load_metrics(add_loads(loads)) | balance_metrics(balance)

    def take_routes(self) -> list[Changes]:
        """What each rank has counted in `log_probs` of routes that were given, since this or `accumulate` last told."""
        calls = [rank.take_routes.remote() for rank in self._ranks]
        return self._gather(calls, "counting routes")

    def log_probs(
        self,
        sequences: Sequence[TrainingSequence],
        temperature: float,
        *,
        as_sent: bool = False,
        of_reference: bool = False,
    ) -> list[npt.NDArray[np.float32]]:
        """The policy's log-probabilities [S] of the sampled tokens of each sequence, with the sampler's experts where these are replayed.

        With `as_sent` under weights that are rounded as those of the rollout workers are; with `of_reference` the frozen reference's.
        """
        work, plan = self._split(sequences)
        how = temperature, self.replay == "sampler", self.precision if as_sent else "model", of_reference
        calls = [r.log_probs.remote(part, *how) for r, part in zip(self._at_work(), work, strict=True)]
        return in_order(plan, self._gather(calls, "computing log-probabilities"))

    def part_distances(
        self, sequence: TrainingSequence, noted: Mapping[str, torch.Tensor]
    ) -> tuple[dict[str, Distance], npt.NDArray[np.float32]]:
        """How far the learner's parts are from what the sampler's computed for a sequence, under the same rounded weights where they are sent so;
        see `PolicyRank.part_distances`."""
        calls = [rank.part_distances.remote(sequence, noted, self.precision) for rank in self._at_work()]
        return self._gather(calls, "comparing parts of the model")[0]

    def _before_updates(self, sequences: Sequence[TrainingSequence], temperature: float) -> list[TrainingSequence]:
        """The sequences with the log-probabilities of the policy before a step's updates, and with its experts where these are replayed."""
        if self.replay != "learner":
            values = self.log_probs(sequences, temperature)
            return [replace(s, old_log_probs=one) for s, one in zip(sequences, values, strict=True)]
        work, plan = self._split(sequences)
        calls = [
            r.log_probs_and_experts.remote(part, temperature) for r, part in zip(self._at_work(), work, strict=True)
        ]
        found = in_order(plan, self._gather(calls, "computing log-probabilities"))
        return [replace(s, old_log_probs=one, experts=own) for s, (one, own) in zip(sequences, found, strict=True)]

    def _split(
        self, sequences: Sequence[TrainingSequence], together: int = 1
    ) -> tuple[list[list[list[TrainingSequence]]], list[list[list[int]]]]:
        lengths = [len(s.token_ids) for s in sequences]
        costs = rows_after_prompts(sequences) if self._options.share_prompts else whole_rows(lengths)
        plan = plan_micro_batches(*costs, self._options.micro_batch_tokens, self._options.ranks, together)
        idle = [replace(one, weight=0.0, experts=None) for one in sequences[:together]]
        return share_out(sequences, plan, *idle), plan
