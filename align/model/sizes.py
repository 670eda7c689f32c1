"""How large a model is, read from its configuration: every parameter's shape on the meta device, without weights."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError

from align.errors import UserError
from align.model.lora import block_of, chosen_parts
from align.model.policy import code_of, first_line, head_width
from align.recipe import LoraOptions, ModelOptions
from rollout.types import expert_dtype

KNOWN = Path(__file__).parent / "known"
KNOWN_NAMES = {
    "deepseek-ai/DeepSeek-V2-Lite": "deepseek_v2_lite.json",
    "deepseek-ai/DeepSeek-V2-Lite-Chat": "deepseek_v2_lite.json",
    "deepseek-ai/DeepSeek-V2": "deepseek_v2.json",
    "deepseek-ai/DeepSeek-V2-Chat": "deepseek_v2.json",
}
LAYER = re.compile(r"\.layers\.\d+\.")
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}
GIB = 2**30
WITHOUT_CACHE = ("linear_attention", "conv", "mamba")
"""Kinds of layers that keep a state of one size, however long a sequence is."""
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """The sizes of a model in elements.

    `parameters` by name; `kv_a_token` in the KV cache for a token in all layers (a latent and a rotary key a layer with MLA,
    576 in DeepSeek-V2: report, section 2.1.2); `experts_a_token` is the share of the routed experts that a token goes
    through. `caps_attention`: the logits of attention have a cap, for which it is computed by plain products.
    """

    parameters: Mapping[str, Shape]
    layers: int
    hidden: int
    vocabulary: int
    heads: int
    kv_a_token: int
    experts_a_token: float
    caps_attention: bool = False

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(map(math.prod, self.parameters.values()))

    @property
    def routed(self) -> int:
        """The parameters of routed experts."""
        return sum(math.prod(shape) for name, shape in self.parameters.items() if ".experts." in name)

    @property
    def active(self) -> int:
        """The parameters that a token is multiplied with; of the embedding it takes a row."""
        return round(sum(self._share(n) * math.prod(s) for n, s in self.parameters.items() if "embed_tokens" not in n))

    @property
    def largest_block(self) -> int:
        """What ZeRO-3 fetches as one at most: a mixture-of-experts block, or a single parameter."""
        blocks: dict[str, int] = {}
        for name, shape in self.parameters.items():
            block = re.sub(r"\.(experts|gate|shared_experts)\..*$", "", name) if self.is_mixture else name
            blocks[block] = blocks.get(block, 0) + math.prod(shape)
        return max(blocks.values())

    @property
    def is_mixture(self) -> bool:
        """Whether there are routed experts."""
        return any(".experts." in name for name in self.parameters)

    @property
    def routes_a_token(self) -> int:
        """Bytes of the experts that a token goes through: the id of each, of one byte or two, in all layers; 0 without routed experts."""
        banks = {n: s for n, s in self.parameters.items() if n.endswith(".experts.down_proj")}
        return sum(round(self._uses(n)) * np.dtype(expert_dtype(s[0])).itemsize for n, s in banks.items())

    @property
    def activations(self) -> tuple[int, int]:
        """Elements that backward needs of a token: in the layer that needs most, and in all layers.

        Of each linear layer its result and one thing made of it; of the residual stream eight copies (two norms in float32).
        """
        layers: dict[str, float] = {}
        for name, shape in self.parameters.items():
            if (found := LAYER.search(name)) and len(shape) > 1:
                layers[found[0]] = layers.get(found[0], 8.0 * self.hidden) + 2 * shape[-2] * self._uses(name)
        return round(max(layers.values())), round(sum(layers.values()))

    def _share(self, name: str) -> float:
        return self.experts_a_token if ".experts." in name else 1.0

    def _uses(self, name: str) -> float:
        """How often a token passes through a parameter: through as many experts as it is sent to."""
        return self.experts_a_token * self.parameters[name][0] if ".experts." in name else 1.0


def read_config(path: str) -> dict[str, Any]:
    """The `config.json` of a model directory, or of a hub name: what is known here, else the hub's. Raises UserError."""
    file = KNOWN / KNOWN_NAMES[path] if path in KNOWN_NAMES else Path(path) / "config.json"
    if file.is_file():
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"model.path: {file} cannot be read as a model's configuration: {error}") from None
        return {name: value for name, value in config.items() if not name.startswith("_")}
    from transformers import AutoConfig

    try:
        found: dict[str, Any] = AutoConfig.from_pretrained(path).to_dict()
    except (OSError, ValueError, StrictDataclassError) as error:
        raise UserError(
            f"model.path: {path} has no config.json here, and the hub does not give it ({first_line(error)}); if an earlier "
            f"stage is to make it, say what it will be like: model.path=DIRECTORY, or one of {', '.join(KNOWN_NAMES)}"
        ) from None
    return found


def empty_model(config: Mapping[str, Any]) -> Any:
    """The model of a configuration on the meta device: shapes without memory. Raises UserError."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(config)
    try:
        architecture = AutoConfig.for_model(values.pop("model_type"), **values)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(architecture)
    except (KeyError, ValueError, TypeError, StrictDataclassError) as error:
        raise UserError(f"model.path: transformers knows no model of this configuration: {first_line(error)}") from None


def skeleton_of(model: ModelOptions, *, reward_model: bool = False) -> Any:
    """The model without weights, on the meta device. Raises UserError where transformers knows no such model, and as `code_of` does."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    architecture = AutoModelForSequenceClassification if reward_model else AutoModelForCausalLM
    try:
        with code_of(model.path, trusted=model.trust_remote_code), torch.device("meta"):
            config = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
            return architecture.from_config(config, trust_remote_code=model.trust_remote_code)
    except (KeyError, OSError, TypeError, ValueError) as error:
        kind = "sequence classifier" if reward_model else "causal language model"
        raise UserError(
            f"model.path: transformers {version('transformers')} can make no {kind} of {model.path}/config.json: {first_line(error)}"
        ) from None


def shapes_of(model: ModelOptions) -> Any:
    """The model on the meta device. Raises UserError. What is known of published models is asked first, unless the model brings its own code."""
    return skeleton_of(model) if model.trust_remote_code else empty_model(read_config(model.path))


def model_sizes(model: Any) -> ModelSizes:
    """The sizes of a model, whatever device it is on. Raises UserError as `share_of_experts` does."""
    config = model.config.get_text_config()
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    return ModelSizes(
        parameters={name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
        layers=layers,
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        heads=heads,
        kv_a_token=kv_elements(config),
        experts_a_token=share_of_experts(config),
        caps_attention=bool(getattr(config, "attn_logit_softcapping", None)),
    )


def kv_elements(config: Any) -> int:
    """The elements of the KV cache that a token takes in all layers, by the configuration of a model's text."""
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    if getattr(config, "kv_lora_rank", None):
        return int(layers * (config.kv_lora_rank + config.qk_rope_head_dim))
    own = layers - (getattr(config, "num_kv_shared_layers", None) or 0)  # the last ones read those of others
    kinds = getattr(config, "layer_types", None) or [""] * layers
    each = [*zip(config.per_layer_config, kinds, strict=False)][:own]
    return sum(
        2 * head_width(layer) * (getattr(layer, "num_key_value_heads", None) or heads)
        for layer, kind in each
        if kind not in WITHOUT_CACHE
    )


def has_attention(config: Any) -> bool:
    """Whether a model has heads of attention, by its configuration: Mamba has none."""
    return bool(getattr(config.get_text_config(), "num_attention_heads", None))


def lacks_cache(max_length: int, needed: float, cache: float, cure: str, beside: str = "") -> str:
    """What is said where one sequence has no room in a worker's KV cache, both in bytes."""
    return (
        f"a rollout worker has {gib(cache)} for its KV cache{beside}, and one sequence of rollout.max_length={max_length} needs "
        f"{gib(needed)}: {cure}"
    )


def gib(size: float) -> str:
    """Bytes in GiB."""
    return f"{size / GIB:.2f} GiB" if size < 10 * GIB else f"{size / GIB:.1f} GiB"


def share_of_experts(config: Any) -> float:
    """The share of its routed experts that a token goes through, by a model's configuration; 1 without any. Raises UserError where it names no such number."""
    experts = getattr(config, "n_routed_experts", None) or getattr(config, "num_experts", None)
    if not experts:
        return 1.0
    # Gemma 4 has a name of its own.
    chosen = getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k_experts", None)
    if not isinstance(chosen, int):
        raise UserError(
            f"model.path: config.json of this {config.model_type} must say through how many of its {experts} experts a token goes "
            f"(num_experts_per_tok), and it has {chosen}"
        )
    return chosen / experts


def sizes_of(path: str) -> ModelSizes:
    """The sizes of the model in a directory, or of a hub name. Raises UserError."""
    return model_sizes(empty_model(read_config(path)))


def sent_bytes(model: ModelOptions, lora: LoraOptions | None) -> int:
    """Bytes of the weights that go to the workers after an update: of all modules, or of those that an adapter changes. Raises UserError."""
    skeleton = shapes_of(model)
    blocks = [""] if lora is None else [f"{block_of(part.parameter)}." for part in chosen_parts(skeleton, lora.targets)]
    sent = (p.numel() for name, p in skeleton.named_parameters() if name.startswith(tuple(blocks)))
    return sum(sent) * ELEMENT_BYTES[model.dtype]


def stored_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's tensors, by the headers of its safetensors files. Raises UserError for a file that is missing or damaged.

    Those are the files that the index names, or else `model.safetensors`: some directories hold the weights a second time, in another layout.
    """
    from safetensors import SafetensorError, safe_open

    again = "Cure: copy or download it again"
    index = directory / "model.safetensors.index.json"
    try:
        named = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else set()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{index} is damaged ({error}). {again}") from None
    if lost := sorted(name for name in named if not (directory / name).is_file()):
        raise UserError(
            f"{directory} lacks {len(lost)} of {len(named)} files with weights, {lost[0]} for one. {again.replace('it', 'them')}"
        )
    shapes: dict[str, tuple[int, ...]] = {}
    whole = directory / "model.safetensors"
    unnamed = [whole] if whole.is_file() else sorted(directory.glob("*.safetensors"))
    for file in sorted(directory / name for name in named) or unnamed:
        try:
            with safe_open(file, framework="pt") as tensors:
                shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            with file.open("rb") as begin:
                is_pointer = begin.read(20) == b"version https://git-"
            told = (
                "a pointer of Git LFS, not the weights. Cure: git lfs pull"
                if is_pointer
                else f"cut off or damaged ({error}). {again}"
            )
            raise UserError(f"{file} is {told}") from None
    return shapes
