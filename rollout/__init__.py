"""Sampling from a policy with vLLM on Ray.

    import ray
    from rollout import Fleet, FleetOptions, Prompt, SamplingOptions

    ray.init()
    fleet = Fleet("path/to/model", "float32", FleetOptions(workers=2), stop_token_ids=[1])
    groups = fleet.sample([Prompt("p0", [0, 17, 5])], 8, SamplingOptions(max_new_tokens=64), seed=0, step=0)

`rollout.types` has the records, `rollout.fleet` the workers together, `rollout.supervisor` what replaces those that are lost, `rollout.worker_handle`
one of them as it is seen from there, `rollout.worker` its process, `rollout.engine` the vLLM engine in that. `rollout.sync` brings new weights to the
workers, and `rollout.weights` into an engine. This package knows nothing of training or rewards.
"""

import warnings
from typing import Any

from rollout.colocation import Colocation
from rollout.fleet import Fleet, sample_seed
from rollout.sync.base import Precision, WeightOptions, WeightSource, WeightSync
from rollout.sync.broadcast import BroadcastSync
from rollout.sync.files import AdapterFiles, AdapterSync, DirectorySync
from rollout.sync.object_store import ObjectStoreSync, stored
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
from rollout.worker_handle import Fault, State

__all__ = [
    "AdapterFiles",
    "AdapterSync",
    "BroadcastSync",
    "Colocation",
    "DirectorySync",
    "EngineOptions",
    "Fault",
    "FinishReason",
    "Fleet",
    "FleetOptions",
    "Group",
    "ObjectStoreSync",
    "Precision",
    "Prompt",
    "RolloutError",
    "SamplingOptions",
    "State",
    "Trajectory",
    "Turn",
    "Versions",
    "WeightOptions",
    "WeightSource",
    "WeightSync",
    "WeightUpdateError",
    "sample_seed",
    "stored",
]

_FORMER_NAMES = {
    "Adapters": AdapterSync,
    "Broadcasts": BroadcastSync,
    "Completion": Trajectory,
    "Directory": DirectorySync,
    "ObjectStore": ObjectStoreSync,
    "Transport": WeightSync,
}


def __getattr__(name: str) -> Any:
    if name not in _FORMER_NAMES:
        raise AttributeError(f"module 'rollout' has no attribute {name!r}")
    found = _FORMER_NAMES[name]
    warnings.warn(f"rollout.{name} is rollout.{found.__name__} now", DeprecationWarning, stacklevel=2)
    return found
