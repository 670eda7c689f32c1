"""What checkpoints call things where the library that writes them and those that read them differ.

Parameters: transformers keeps the experts of a layer stacked, `experts.gate_up_proj` [E, 2I, H] and `experts.down_proj` [E, H, I];
a checkpoint has one tensor an expert and projection, `experts.3.gate_proj.weight` [I, H] and so on, as vLLM and the hub read it.

Configurations and tokenizers: transformers 5 writes some settings under new names, which are added under the old ones too. Without them
transformers 4.57 refuses the tokenizer ("TokenizersBackend does not exist"), and takes a rotary base of 10,000 and no YaRN without a word.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from align.errors import UserError
from reward.vocabulary import builds_its_rules

FUSED = re.compile(r"^(?P<prefix>.*\.experts)\.(?P<kind>gate_up_proj|down_proj)$")
SPLIT = re.compile(r"^(?P<prefix>.*\.experts)\.(?P<expert>\d+)\.(?P<kind>\w+)\.weight$")


@dataclass(frozen=True, slots=True)
class Layout:
    """What a checkpoint calls the block that holds router and experts, and an expert's projections."""

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


USUAL = Layout()
OTHERS = {"mixtral": Layout("block_sparse_moe", "w1", "w3", "w2")}


def layout_of(model_type: str) -> Layout:
    """The layout of an architecture's checkpoints, by the `model_type` of its configuration."""
    return OTHERS.get(model_type, USUAL)


def checkpoint_name(name: str, layout: Layout) -> str:
    """What a checkpoint calls a parameter, or what is below a module, but for stacked experts."""
    return name.replace(f".{USUAL.block}.", f".{layout.block}.")


def to_checkpoint(
    named_tensors: Iterable[tuple[str, torch.Tensor]], layout: Layout = USUAL
) -> Iterator[tuple[str, torch.Tensor]]:
    """Split fused experts into the checkpoint's tensors; views, not copies. Others keep all of their name but the block's."""
    for inner, tensor in named_tensors:
        name = checkpoint_name(inner, layout)
        match = FUSED.match(name)
        if match is None:
            yield name, tensor
            continue
        for expert, weight in enumerate(tensor):
            at = f"{match['prefix']}.{expert}"
            if match["kind"] == "down_proj":
                yield f"{at}.{layout.down}.weight", weight
            else:
                gate, up = weight.chunk(2, dim=0)
                yield f"{at}.{layout.gate}.weight", gate
                yield f"{at}.{layout.up}.weight", up


def from_checkpoint(named_tensors: Mapping[str, torch.Tensor], layout: Layout = USUAL) -> dict[str, torch.Tensor]:
    """Stack a checkpoint's experts as transformers keeps them: the inverse of `to_checkpoint`."""
    fused: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[tuple[int, str], torch.Tensor]] = {}
    for outer, tensor in named_tensors.items():
        name = outer.replace(f".{layout.block}.", f".{USUAL.block}.")
        match = SPLIT.match(name)
        if match is None:
            fused[name] = tensor
        else:
            experts.setdefault(match["prefix"], {})[int(match["expert"]), match["kind"]] = tensor
    for prefix, parts in experts.items():
        count = 1 + max(expert for expert, _ in parts)
        gate_up = [torch.cat([parts[e, layout.gate], parts[e, layout.up]]) for e in range(count)]
        fused[f"{prefix}.gate_up_proj"] = torch.stack(gate_up)
        fused[f"{prefix}.down_proj"] = torch.stack([parts[e, layout.down] for e in range(count)])
    return fused


ATTENTION = "self_attn|attn|attention|linear_attn"
"""What models call their attention, and layers that stand in its place."""
PARTS = {
    "router": r"\.(gate|router)\.",
    "experts": r"\.experts\.",
    "shared_experts": r"\.shared_experts?(_gate)?\.",
    "attention": rf"\.({ATTENTION})\.",
    "mlp": r"\.(mlp|feed_forward)\.(?!gate\.|router\.|experts\.|shared_expert)",
    "norms": r"norm[^.]*\.(weight|bias)$",
    "embeddings": r"\b(embed_tokens|wte)\.",
    "head": r"\blm_head\.",
}
"""By what is in their names, the parameters of the parts that `learner.freeze` can name. Those that are tied to the embeddings have no name of their own."""


LAYER = re.compile(r"\b(?:layers|h|blocks)\.(\d+)\.")


def names_of_part(names: Sequence[str], part: str) -> set[str]:
    """The parameters of a part that `learner.freeze` can name: by PARTS, or, of `first_N_layers`, by the number of their layer.

    Raises UserError where no layer would be left.
    """
    if part in PARTS:
        return {name for name in names if re.search(PARTS[part], name)}
    first = int(part.split("_")[1])
    layers = {name: int(found[1]) for name in names if (found := LAYER.search(name))}
    if layers and first > max(layers.values()):
        raise UserError(
            f"learner.freeze: {part} is more than all but one of the model's {1 + max(layers.values())} layers"
        )
    return {name for name, layer in layers.items() if layer < first}


def frozen_names(names: Iterable[str], freeze: Sequence[str]) -> set[str]:
    """The parameters, of those with these names, that `freeze` means.

    Raises UserError where one of its parts means none, and where nothing is left to train.
    """
    names, frozen = list(names), set[str]()
    for part in freeze:
        found = names_of_part(names, part)
        if not found:
            there = [other for other, pattern in PARTS.items() if any(re.search(pattern, name) for name in names)]
            raise UserError(f"learner.freeze: the model has no {part} of its own; it has {', '.join(there)}")
        frozen |= found
    if len(frozen) == len(names):
        raise UserError(f"learner.freeze: {', '.join(freeze)} is all that the model has, and nothing would be trained")
    return frozen


NEW_CLASS, OLD_CLASS = "TokenizersBackend", "PreTrainedTokenizerFast"


def add_older_forms(directory: Path, config: Any, tokenizer: Any) -> None:
    """Add to the configuration and the tokenizer of a checkpoint in `directory` what an older transformers reads."""
    _edit(directory / "config.json", lambda written: written | _older_config(written, config))
    _edit(directory / "tokenizer_config.json", lambda written: written | _older_tokenizer(written, tokenizer))


def _edit(file: Path, change: Any) -> None:
    if file.is_file():
        written = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(
            json.dumps(change(written), indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8"
        )


def _older_config(written: dict[str, Any], config: Any) -> dict[str, Any]:
    older: dict[str, Any] = {}
    rope = written.get("rope_parameters") or {}
    # Gemma 3 has a rotary base of its own for layers with a window.
    if "full_attention" in rope and "sliding_attention" in rope:
        older["rope_local_base_freq"] = rope["sliding_attention"].get("rope_theta")
        rope = rope["full_attention"]
    if "rope_theta" in rope:
        older["rope_theta"] = rope["rope_theta"]
        scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
        older["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else scaling
        if older["rope_scaling"] and config.model_type == "phi3":  # which takes these three keys and no other
            factors = {key: rope[key] for key in ("short_factor", "long_factor")}
            older["rope_scaling"] = {"type": rope["rope_type"], **factors}
    if "partial_rotary_factor" in rope:
        older["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if config.attribute_map.get("num_experts") in written:
        older["num_experts"] = written[config.attribute_map["num_experts"]]
    return older


def _older_tokenizer(written: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    from transformers.models.auto.tokenization_auto import get_tokenizer_config, tokenizer_class_from_name

    older: dict[str, Any] = {}
    if written.get("tokenizer_class") == NEW_CLASS:
        base = get_tokenizer_config(tokenizer.name_or_path).get("tokenizer_class") if tokenizer.name_or_path else None
        kept = base not in (None, NEW_CLASS) and not builds_its_rules(
            tokenizer_class_from_name(base.removesuffix("Fast"))
        )
        older["tokenizer_class"] = base if kept else OLD_CLASS
        older["model_input_names"] = tokenizer.model_input_names
    extra = written.get("extra_special_tokens")
    if isinstance(extra, list):
        older |= {"additional_special_tokens": extra, "extra_special_tokens": {}}
    return older
