"""Presets of `grpo.preset`: published methods by the names that users know, as the keys of `grpo` that they stand for."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

PresetName = Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce++"]


@dataclass(frozen=True, slots=True)
class Preset:
    """A method: `defining` are the keys that make it what it is, `usual` its settings, in the place of which others may be given."""

    source: str
    defining: Mapping[str, Any]
    usual: Mapping[str, Any]


UNCLIPPED = "with a single update a step (grpo.updates_per_step) all ratios are 1, and nothing is clipped"
CLIPPED = MappingProxyType({"level": "token", "clip_low": 0.2, "clip_high": 0.2})
BY_STD = MappingProxyType({"advantage_scale": "std"})
PRESETS: Mapping[str, Preset] = {
    "grpo": Preset(
        "DeepSeekMath, arXiv 2402.03300",
        {"baseline": "group", "cispo_max": None},
        {**CLIPPED, **BY_STD, "aggregation": "sample_mean"},
    ),
    "dr_grpo": Preset(
        "arXiv 2503.20783",
        {"baseline": "group", "cispo_max": None, "advantage_scale": "none", "aggregation": "constant_length"},
        CLIPPED,
    ),
    "dapo": Preset(
        "arXiv 2503.14476",
        {"baseline": "group", "cispo_max": None, "aggregation": "token_mean"},
        {
            **CLIPPED,
            **BY_STD,
            "clip_high": 0.28,
            "kl_coefficient": 0.0,
            "refill_rounds": 10,
            "drop_zero_variance_groups": True,
        },
    ),
    "gspo": Preset(
        "arXiv 2507.18071",
        {"baseline": "group", "cispo_max": None, "level": "geometric", "aggregation": "sample_mean"},
        {**BY_STD, "clip_low": 3e-4, "clip_high": 4e-4},
    ),
    "cispo": Preset(
        "MiniMax-M1, arXiv 2506.13585; the bound of ScaleRL, arXiv 2510.13786",
        {"level": "token"},
        {**BY_STD, "cispo_max": 5.0, "baseline": "group", "aggregation": "token_mean"},
    ),
    "rloo": Preset(
        "arXiv 2402.14740",
        {"baseline": "leave_one_out", "cispo_max": None},
        {**CLIPPED, "level": "sequence", "aggregation": "sequence_sum", "advantage_scale": "none"},
    ),
    "reinforce++": Preset(
        "arXiv 2501.03262",
        {"advantage_scale": "batch", "cispo_max": None},
        {**CLIPPED, "baseline": "batch", "aggregation": "token_mean"},
    ),
}


def spelled_out(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """The options with the keys that their preset stands for; what is given, and not null, stays."""
    name: Any = options.get("preset")
    if name not in list(PRESETS):
        return options
    stands_for = {**PRESETS[name].usual, **PRESETS[name].defining}
    return {**options, **{key: value for key, value in stands_for.items() if options.get(key) is None}}


def contradiction(options: Mapping[str, Any]) -> str | None:
    """What is wrong with given options that have another value for a key that makes their preset what it is."""
    name: Any = options.get("preset")
    if name not in list(PRESETS):
        return None
    preset = PRESETS[name]
    for key, value in preset.defining.items():
        if (given := options.get(key)) is not None and given != value:
            there = f"has no {key}" if value is None else f"is {key}: {value}"
            return f"preset: {name} ({preset.source}) {there}, which {key}: {given} contradicts: leave one of them out"
    return None


def unclipped(options: Any) -> str:
    """Which keys of a recipe's `grpo` that clip have no effect, and why; "" where there are none."""
    fields, clipping = type(options).model_fields, ("clip_low", "clip_high", "cispo_max")
    given = [f"grpo.{key}" for key in clipping if getattr(options, key) != fields[key].default]
    return f"{', '.join(given)}: {UNCLIPPED}" if given and options.updates_per_step == 1 else ""


def expansion(options: Any) -> str:
    """What the preset of a recipe's `grpo` stands for there."""
    preset = PRESETS[options.preset]
    parts = []
    for key, value in {**preset.usual, **preset.defining}.items():
        given = getattr(options, key)
        if given is not None:
            parts.append(f"{key}: {given}" + (f" (given, for {value})" if given != value else ""))
    told = f"grpo.preset: {options.preset} is {', '.join(parts)}".replace("True", "true")
    return f"{told}; {UNCLIPPED}" if options.updates_per_step == 1 else told
