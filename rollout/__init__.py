"""Sampling from a policy with vLLM on Ray.

    import ray
    from rollout import Fleet, FleetOptions, Prompt, SamplingOptions

    ray.init()
    fleet = Fleet("path/to/model", "float32", FleetOptions(workers=2), stop_token_ids=[1])
    groups = fleet.sample([Prompt("p0", [0, 17, 5])], 8, SamplingOptions(max_new_tokens=64), seed=0, step=0)

`rollout.types` has the records, `Fleet` the workers together, `rollout.supervisor` what replaces those that are lost,
`rollout.engine` one vLLM engine, `rollout.sync.base` how new weights come to it, `rollout.weights` how they get into it. This package knows
nothing of training or rewards.
"""

from rollout.fleet import Fleet
from rollout.health import Fault, State
from rollout.seeds import sample_seed
from rollout.sync.base import (
    AdapterFiles,
    Adapters,
    Directory,
    ObjectStore,
    Transport,
    WeightOptions,
    WeightSource,
    stored,
)
from rollout.sync.broadcast import Broadcast, Broadcasts
from rollout.types import (
    EngineOptions,
    FinishReason,
    FleetOptions,
    Group,
    Prompt,
    RolloutError,
    SamplingOptions,
    Trajectory,
    Turn,
    Versions,
    WeightUpdateError,
)

__all__ = [
    "AdapterFiles",
    "Adapters",
    "Broadcast",
    "Broadcasts",
    "Directory",
    "EngineOptions",
    "Fault",
    "FinishReason",
    "Fleet",
    "FleetOptions",
    "Group",
    "ObjectStore",
    "Prompt",
    "RolloutError",
    "SamplingOptions",
    "State",
    "Trajectory",
    "Transport",
    "Turn",
    "Versions",
    "WeightOptions",
    "WeightSource",
    "WeightUpdateError",
    "sample_seed",
    "stored",
]
