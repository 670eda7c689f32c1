"""Parameter names: transformers' fused experts against the checkpoint format that vLLM and the hub read.

transformers keeps the experts of a layer stacked, `experts.gate_up_proj` [E, 2I, H] and `experts.down_proj` [E, H, I];
a checkpoint has one tensor an expert and projection, `experts.3.gate_proj.weight` [I, H] and so on.
"""

import re
from collections.abc import Iterable, Iterator, Mapping

import torch

FUSED = re.compile(r"^(?P<prefix>.*\.experts)\.(?P<kind>gate_up_proj|down_proj)$")
SPLIT = re.compile(r"^(?P<prefix>.*\.experts)\.(?P<expert>\d+)\.(?P<kind>gate_proj|up_proj|down_proj)\.weight$")


def to_checkpoint(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Split fused experts into the checkpoint's tensors; views, not copies. Other tensors pass as they are."""
    for name, tensor in named_tensors:
        match = FUSED.match(name)
        if match is None:
            yield name, tensor
            continue
        for expert, weight in enumerate(tensor):
            at = f"{match['prefix']}.{expert}"
            if match["kind"] == "down_proj":
                yield f"{at}.down_proj.weight", weight
            else:
                gate, up = weight.chunk(2, dim=0)
                yield f"{at}.gate_proj.weight", gate
                yield f"{at}.up_proj.weight", up


def from_checkpoint(named_tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stack a checkpoint's experts as transformers keeps them: the inverse of `to_checkpoint`."""
    fused: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[tuple[int, str], torch.Tensor]] = {}
    for name, tensor in named_tensors.items():
        match = SPLIT.match(name)
        if match is None:
            fused[name] = tensor
        else:
            experts.setdefault(match["prefix"], {})[int(match["expert"]), match["kind"]] = tensor
    for prefix, parts in experts.items():
        count = 1 + max(expert for expert, _ in parts)
        gate_up = [torch.cat([parts[e, "gate_proj"], parts[e, "up_proj"]]) for e in range(count)]
        fused[f"{prefix}.gate_up_proj"] = torch.stack(gate_up)
        fused[f"{prefix}.down_proj"] = torch.stack([parts[e, "down_proj"] for e in range(count)])
    return fused
