"""What recording the sampler's experts and replaying them costs: `make bench-routing`, a few minutes on a CPU.

The nano policy with random weights samples the same prompts in two workers, one of which records; a learner's forward and backward passes over
what was sampled go through these experts, or where its routers send them. Ten pairs each, in turn; CPU seconds of the process that does it, and
the share that it takes longer, with the 95 % interval of the mean of the pairs.
"""

import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from functools import partial
from math import nan
from pathlib import Path
from statistics import fmean, median

import psutil
import torch

from align.experience import training_sequence
from align.learner.batch import collate
from align.learner.objective import LogProbs
from align.learner.routing import RoutingReplay
from align.model.policy import load_policy, write_random_policy
from align.recipe import ModelOptions
from align.session.ray import local_ray
from align.statistics import mean_interval
from rollout import Fleet, FleetOptions, Prompt, SamplingOptions, Trajectory

NANO = Path(__file__).resolve().parents[1] / "recipes/nano/policy"
PAIRS, PROMPTS, GROUP, PROMPT_TOKENS, NEW_TOKENS, MICRO_BATCH = 10, 32, 8, 48, 48, 64
OPTIONS = FleetOptions(workers=1, max_length=128, kv_cache_gb=0.5, batch_sequences=PROMPTS * GROUP)


def main() -> int:
    """Measure and print. Returns 0."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        model = ModelOptions(path=str(Path(scratch) / "policy"))
        write_random_policy(ModelOptions(path=str(NANO), init="random"), Path(model.path), seed=0)
        with local_ray():
            drawn = record(model)
        replay(model, drawn)
    return 0


def record(model: ModelOptions) -> list[Trajectory]:
    """Sample with and without recording. Returns what was sampled, with its experts."""
    with ExitStack() as stack:
        options = [OPTIONS.model_copy(update={"record_experts": records}) for records in (False, True)]
        fleets = [stack.enter_context(closing(Fleet(model.path, model.dtype, each, [1]))) for each in options]
        for fleet in fleets:
            fleet.wait_until_ready()
        # First batches are slower, and who the process of a worker is shows once it has worked.
        plain, drawn = map(sampled, fleets)
        assert [list(t.token_ids) for t in plain] == [list(t.token_ids) for t in drawn]
        report("recording", *in_turn([partial(sampled, fleet) for fleet in fleets], [worker(f) for f in fleets]))
    return drawn


def sampled(fleet: Fleet) -> list[Trajectory]:
    """The samples of a step, the same each time, in the order of their prompts."""
    prompts = [Prompt(f"p{i:02}", [(7 * i + 3 * j) % 90 + 5 for j in range(PROMPT_TOKENS)]) for i in range(PROMPTS)]
    groups = fleet.sample(prompts, GROUP, SamplingOptions(max_new_tokens=NEW_TOKENS), seed=0, step=0)
    return [t for group in sorted(groups, key=lambda group: group.prompt.id) for t in group.trajectories]


def worker(fleet: Fleet) -> psutil.Process:
    """The process of a fleet's only worker."""
    process = fleet.workers[0].process
    assert process is not None
    return psutil.Process(process.pid)


def replay(model: ModelOptions, drawn: Sequence[Trajectory]) -> None:
    """Forward and backward passes over samples, with their experts and without."""
    policy = LogProbs(load_policy(model))
    routing, batch = RoutingReplay(policy), collate([training_sequence(t) for t in drawn[:MICRO_BATCH]], 1)

    def passes(routes: Sequence[torch.Tensor]) -> None:
        with routing.given(routes, forced=True):
            values, _ = policy(**batch.inputs, temperature=1.0)
            torch.where(batch.mask, values, 0.0).sum().backward()

    ways = [partial(passes, []), partial(passes, batch.routes)]
    for way in ways:
        way()
    report("replay", *in_turn(ways, [psutil.Process()] * 2))


def in_turn(ways: Sequence[Callable[[], object]], processes: Sequence[psutil.Process]) -> tuple[list[float], ...]:
    """CPU seconds that the process of each way took for it, in `PAIRS` turns."""
    taken: tuple[list[float], ...] = ([], [])
    for turn in range(PAIRS):
        # Each goes first half of the times.
        for place in (0, 1) if turn % 2 else (1, 0):
            before = processes[place].cpu_times()
            ways[place]()
            after = processes[place].cpu_times()
            taken[place].append(after.user + after.system - before.user - before.system)
    return taken


def report(what: str, without: Sequence[float], with_it: Sequence[float]) -> None:
    """Print the medians, and how much longer it takes."""
    shares = [b / a - 1 for a, b in zip(without, with_it, strict=True)]
    low, high = mean_interval(shares) or (nan, nan)
    print(
        f"{what}: {median(without):.3f} CPU s without, {median(with_it):.3f} with: {fmean(shares):+.1%} ({low:+.1%} to {high:+.1%})",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
