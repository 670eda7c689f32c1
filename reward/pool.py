"""Scoring beside sampling: a mixture in a pool of Ray actors, handed each group as soon as it is complete.

    pool = ScoringPool(mixture, workers=1, timeout_s=600)
    tickets = [pool.submit(samples) for samples in groups]
    rewards = pool.gather(tickets)

Ray must be running. What a worker's death leaves unjudged is tried once more by a new worker and then masked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from reward.mixture import RECENT_BATCHES, RECENT_SAMPLES, Mixture
from reward.types import RewardContractError, RewardError, Sample, SampleReward, Score, Verdict

_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
_ATTEMPTS = 2
START_S = 300.0


class ScoringWorker:
    """One process of the pool."""

    def __init__(self, mixture: Mixture) -> None:
        self._mixture = mixture

    def make_ready(self) -> None:
        self._mixture.make_ready()

    def score(self, samples: Sequence[Sample]) -> list[SampleReward]:
        return self._mixture.score_each(samples)


@dataclass(eq=False)
class Ticket:
    """A batch of samples on its way: which worker has it, its place in the order of handing out, and its result to be."""

    samples: Sequence[Sample]
    worker: int
    order: int = 0
    result: Any = None
    deaths: int = 0


class ScoringPool:
    """Workers that each hold the mixture; a batch goes to the one with the fewest batches waiting."""

    def __init__(
        self, mixture: Mixture, *, workers: int, timeout_s: float, gpus: float = 0.0, start_timeout_s: float = START_S
    ) -> None:
        """Start the workers, each with `gpus` GPUs; with none they see none.

        `timeout_s`: how long all of them together may take until one more batch is judged; `start_timeout_s`: how long each may take to load
        what its rewards need.
        """
        self.mixture = mixture
        self._timeout_s, self._gpus, self._start_timeout_s = timeout_s, gpus, start_timeout_s
        self._workers = [self._start() for _ in range(workers)]
        self._waiting = [0] * workers
        self._handed_out = 0
        self._recent: list[Sequence[SampleReward]] = []
        self._most = RECENT_BATCHES

    def wait_until_ready(self) -> None:
        """Return when every worker is. Raises RewardError where this machine cannot run a reward of the mixture."""
        self._wait_for(self._workers)

    def _wait_for(self, workers: Sequence[Any], *, may_die: bool = False) -> None:
        """Return when the workers are ready, or where they `may_die` are gone: then what they are handed next tells it."""
        import ray

        try:
            ray.get([worker.make_ready.remote() for worker in workers], timeout=self._start_timeout_s)
        except ray.exceptions.RayTaskError as error:
            raise _cause(error) from None
        except ray.exceptions.GetTimeoutError:
            raise RewardError(f"a scoring worker was not ready within {self._start_timeout_s:g} s") from None
        except ray.exceptions.RayError as error:
            if not may_die:
                raise RewardError(f"a scoring worker did not start: {error}") from None

    def submit(self, samples: Sequence[Sample]) -> Ticket:
        """Hand a batch to a worker, and return at once."""
        worker = min(range(len(self._workers)), key=lambda number: self._waiting[number])
        ticket = Ticket(samples, worker)
        self._hand_out(ticket)
        return ticket

    def gather(self, tickets: Sequence[Ticket], *, alone: bool = False) -> list[list[SampleReward]]:
        """The rewards of each batch, in its order. Raises what `Mixture.score_each` does, and InfrastructureError where too many samples of these
        batches could not be judged, and of those before them unless these stand `alone` (`Mixture.refuse_too_many_masked`).

        RewardContractError too, naming samples, when none is judged for `timeout_s`.
        """
        import ray

        open_, found = list(tickets), dict[Ticket, list[SampleReward]]()
        while open_:
            by_result = {ticket.result: ticket for ticket in open_}
            done, _ = ray.wait(list(by_result), num_returns=1, timeout=self._timeout_s)
            if not done:
                raise self._hanging(min(open_, key=lambda one: one.order))
            ticket = by_result[done[0]]
            if not self._take(ticket, found):
                lost = [one for one in open_ if one.worker == ticket.worker and not self._take(one, found)]
                self._replace(ticket.worker, lost, found)
            open_ = [one for one in open_ if one not in found]
        rewards = [found[ticket] for ticket in tickets]
        if not alone:
            self._most = max(self._most, len(rewards))
            self._recent = recent_batches(self._recent, rewards, self._most)
        self.mixture.refuse_too_many_masked(
            [sample for ticket in tickets for sample in ticket.samples],
            [reward for batch in rewards for reward in batch],
            rewards if alone else self._recent,
        )
        return rewards

    def close(self) -> None:
        """End the workers' processes, and those they started."""
        import ray

        for worker in self._workers:
            ray.kill(worker)
        self._workers = []

    def _start(self) -> Any:
        import ray

        # An actor without a GPU would see all those of its node.
        variables = _ENVIRONMENT | ({} if self._gpus else {"CUDA_VISIBLE_DEVICES": ""})
        actor = ray.remote(num_cpus=0, num_gpus=self._gpus, max_restarts=0, runtime_env={"env_vars": variables})
        return actor(ScoringWorker).remote(self.mixture)

    def _hand_out(self, ticket: Ticket) -> None:
        ticket.result = self._workers[ticket.worker].score.remote(ticket.samples)
        ticket.order = self._handed_out
        self._handed_out += 1
        self._waiting[ticket.worker] += 1

    def _take(self, ticket: Ticket, found: dict[Ticket, list[SampleReward]]) -> bool:
        """Whether the batch has been judged; if so its rewards are in `found`. False where its worker died before.

        Called when the batch is judged or its worker is dead: Ray then answers, however long it takes on a busy machine.
        """
        import ray

        try:
            found[ticket] = ray.get(ticket.result, timeout=self._timeout_s)
        except ray.exceptions.RayTaskError as error:
            raise _cause(error) from None
        except ray.exceptions.GetTimeoutError:
            raise self._hanging(ticket) from None
        except ray.exceptions.RayError:  # it died, was killed for want of memory, or was lost with its node
            return False
        self._waiting[ticket.worker] -= 1
        return True

    def _replace(self, number: int, lost: Sequence[Ticket], found: dict[Ticket, list[SampleReward]]) -> None:
        """A new worker in the place of a dead one, which died of the batch it was at: the earliest that it had."""
        self._workers[number] = self._start()
        self._waiting[number] = 0
        self._wait_for([self._workers[number]], may_die=True)
        culprit, *others = sorted(lost, key=lambda ticket: ticket.order)
        culprit.deaths += 1
        for ticket in others:
            self._hand_out(ticket)
        if culprit.deaths < _ATTEMPTS:
            self._hand_out(culprit)
        else:
            found[culprit] = [self._masked() for _ in culprit.samples]

    def _masked(self) -> SampleReward:
        score = Score(math.nan, Verdict.INFRA_ERROR, "the process that was judging it died, twice")
        measures = not any(term.weight for term in self.mixture.terms)
        components = {term.component: score for term in self.mixture.terms}
        return SampleReward(0.0 if measures else None, Verdict.INFRA_ERROR, components)

    def _hanging(self, ticket: Ticket) -> RewardContractError:
        names = ", ".join(term.name for term in self.mixture.terms)
        ids = f"{ticket.samples[0].id} … {ticket.samples[-1].id}"
        return RewardContractError(names, ids, f"none of them was judged within {self._timeout_s:g} s")


def recent_batches(
    before: Sequence[Sequence[SampleReward]], new: Sequence[Sequence[SampleReward]], most: int = RECENT_BATCHES
) -> list[Sequence[SampleReward]]:
    """The `new` batches, and of those before them so many that there are `most`, and `RECENT_SAMPLES`, where there were."""
    batches = [*before, *new]
    while len(batches) > most and sum(map(len, batches[1:])) >= RECENT_SAMPLES:
        batches.pop(0)
    return batches


def _cause(error: Any) -> RewardError:
    cause = error.cause
    return cause if isinstance(cause, RewardError) else RewardError(f"a scoring worker failed:\n{error}")
