"""All that a learner rank must remember to go on exactly: parameters, master copies, moments, random numbers.

DeepSpeed's own checkpoints hold pickled objects and have their own idea of the newest; these are tensors in plain mappings,
loaded with `weights_only`. Each rank writes what it alone holds; what all ranks hold is written by the first.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from align.learner.experts import is_spread
from align.run.checkpoints import Entry, hashed_file

SHARED = "parameters.pt"
# Where DeepSpeed's optimizers keep the tensors that the torch optimizer steps on, by its ways to train.
MASTERS = (
    "single_partition_of_fp32_groups",  # ZeRO-1 and -2
    "fp32_partitioned_groups_flat",  # ZeRO-3
    "fp32_groups_flat_partition",  # bfloat16 without ZeRO
    "fp32_groups_flat",
    "fp32_groups",
)


WRITTEN_A_SECOND = 0.5e9
"""Bytes that all learner ranks together are taken to write to the file system of the run directory, at least."""


def own_file(rank: int) -> str:
    """The name of a rank's file in a checkpoint."""
    return f"rank_{rank:05d}.pt"


def save_state(engine: Any, directory: Path, more: Mapping[str, torch.Tensor]) -> dict[str, Entry]:
    """Write the state of a DeepSpeed engine's rank and `more` tensors into a checkpoint; returns the files' entries."""
    # What is on a GPU goes through the CPU's memory while it is written, a tensor at a time: all of it would be 12 bytes a parameter.
    own: dict[str, Any] = {
        "masters": [master.detach() for master in _masters(engine) or []],
        "moments": [dict(engine.basic_optimizer.state.get(master, {})) for master in _stepped(engine)],
        "random": _random_states(),
        "more": dict(more),
    }
    alone = _held_alone(engine)
    parameters = _parameters(engine)
    own["parameters"] = {name: tensor.cpu() for name, tensor in parameters.items() if name in alone}
    files = {own_file(engine.global_rank): own}
    if engine.global_rank == 0:
        # Views of one buffer, that would be written whole for each file.
        files[SHARED] = {name: tensor.cpu() for name, tensor in parameters.items() if name not in alone}
    entries = {}
    for name, content in files.items():
        with hashed_file(directory / name) as (file, entry):
            torch.save(content, file)
        entries[name] = entry
    return entries


def load_state(engine: Any, directory: Path) -> dict[str, torch.Tensor]:
    """Put the state of a rank back, into an engine of the same making; returns what `save_state` was given as `more`.

    Raises ValueError where the engine is of another making.
    """
    own = _read(directory / own_file(engine.global_rank))
    saved = own["parameters"] | _read(directory / SHARED)
    parameters = _parameters(engine)
    if saved.keys() != parameters.keys():
        raise ValueError(f"the checkpoint has {len(saved)} trained parameters, and the model {len(parameters)}")
    for name, tensor in parameters.items():
        _copy(saved[name], tensor, name)
    masters = _masters(engine) or []
    if len(own["masters"]) != len(masters):
        raise ValueError(
            f"it has {len(own['masters'])} groups of master copies, and this learner {len(masters)}; another version of this "
            "software wrote it, or another learner.zero_stage"
        )
    for number, (content, master) in enumerate(zip(own["masters"], masters, strict=True)):
        _copy(content, master, f"master copy {number}")
    state = engine.basic_optimizer.state
    for content, master in zip(own["moments"], _stepped(engine), strict=True):
        if content:
            # Adam's count of steps too, a tensor of one number: its fused kernel reads that on the device.
            state[master] = {name: value.to(master.device, copy=True) for name, value in content.items()}
    if _is_partitioned(engine) and (kept := engine.optimizer.persistent_parameters):
        # Small parameters are whole on every rank between steps, and those copies are of before.
        kept[0].partition(kept)
        kept[0].all_gather(kept)
    torch.set_rng_state(own["random"]["cpu"])
    if "cuda" in own["random"]:
        torch.cuda.set_rng_state(own["random"]["cuda"])
    more: dict[str, torch.Tensor] = own["more"]
    return more


def _is_partitioned(engine: Any) -> bool:
    return bool(engine.zero_optimization_stage() == 3)


def _parameters(engine: Any) -> dict[str, torch.Tensor]:
    """What this rank holds of each trained parameter."""
    return {
        name: (parameter.ds_tensor if _is_partitioned(engine) else parameter).detach()
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
    }


def _held_alone(engine: Any) -> set[str]:
    """Names of the parameters of which no other rank holds what this one does."""
    trained = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    return {name for name, parameter in trained.items() if _is_partitioned(engine) or is_spread(parameter)}


def _masters(engine: Any) -> list[torch.Tensor] | None:
    """The tensors that the torch optimizer steps on, or None where these are the parameters themselves."""
    if engine.optimizer is engine.basic_optimizer:
        return None
    for name in MASTERS:
        if hasattr(engine.optimizer, name):
            groups = getattr(engine.optimizer, name)
            # One flat tensor a group, or the parameters of a group.
            return [master for group in groups for master in (group if isinstance(group, list) else [group])]
    raise TypeError(f"no master copies known of DeepSpeed's {type(engine.optimizer).__name__}")


def _stepped(engine: Any) -> list[torch.Tensor]:
    masters = _masters(engine)
    if masters is not None:
        return masters
    return [parameter for group in engine.basic_optimizer.param_groups for parameter in group["params"]]


def _random_states() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else states


def _copy(content: torch.Tensor, tensor: torch.Tensor, name: str) -> None:
    if content.shape != tensor.shape or content.dtype != tensor.dtype:
        raise ValueError(
            f"{name} is {content.dtype} {list(content.shape)} in the checkpoint, and {tensor.dtype} {list(tensor.shape)} here"
        )
    with torch.no_grad():
        tensor.copy_(content)


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return content
