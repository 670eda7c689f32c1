"""The doctor: what is usually found out too late about a model, checked before anything is trained.

`examine` needs only the files of a model; `doctor_engines` has what needs a running sampler and learner. Each check answers with
one line, and a failure with its cause and its cure.
"""

import math
import re
from collections.abc import Collection, Sequence
from copy import deepcopy
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

import torch

from align.data.chat import encode_example, encode_prompt
from align.errors import UserError
from align.model.names import from_checkpoint, layout_of, to_checkpoint
from align.model.policy import persistent_buffers, stop_token_ids, tied_names, turn_end
from align.model.sizes import ELEMENT_BYTES, GIB, has_attention, kv_elements, lacks_cache, skeleton_of, stored_shapes
from align.recipe import ModelOptions
from reward.learned.model import has_fused_experts
from rollout import EngineOptions, FleetOptions
from rollout.arguments import Device, refusal
from rollout.processes import cluster_address

ROUND_TRIP = "  What is 17 + 25?\n\n\tnaïve Größe, 你好，мир, 42,000.5 — \\boxed{-7} 🙂"
EXPERT_TOLERANCE = 1e-4
CPU_HEADS: Sequence[int] = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
CPU_LATENTS: Sequence[int] = (576,)
"""Those of vLLM's `CPUAttentionBackend` and `CPUMLABackend`, whose import takes seconds."""
Options = TypeVar("Options", bound=EngineOptions)
STRETCHED: Sequence[str] = ("su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling")
"""Types of ropes whose factor vLLM finds in `max_position_embeddings` already."""
SPARE_TOKENS = 256
"""Tokens of two blocks of the KV cache: what the last one leaves empty, and the one that vLLM keeps."""


class CheckStatus(StrEnum):
    """How a check ended."""

    OK = "ok"
    LIMITED = "limited"
    """Not for every stage: the detail says for which not."""
    SKIPPED = "skipped"
    FAILED = "FAILED"


OK, LIMITED, SKIPPED, FAILED = CheckStatus
Finding = tuple[CheckStatus, str]
"""How a check ended and what it saw; for a failure, cause and cure."""


@dataclass(frozen=True, slots=True)
class Check:
    """What was looked at, how it ended, and what was seen; for a failure, cause and cure."""

    name: str
    status: CheckStatus
    detail: str


class DoctorError(UserError):
    """A check failed; the message names each with its cause and cure."""


def examine(
    model: ModelOptions, tokenizer: Any, *, reward_model: bool = False, rollout: FleetOptions | None = None
) -> list[Check]:
    """Check what a model's small files and the headers of its weights tell; with `rollout`, also that vLLM takes it so.

    It should be a policy, or with `reward_model` a sequence classifier. Raises UserError where transformers knows no such model.
    """
    skeleton = skeleton_of(model, reward_model=reward_model)
    findings = {
        "tokenizer round trip": check_round_trip(tokenizer),
        "chat template": check_template(tokenizer),
        "demonstrations": check_demonstrations(tokenizer),
        "end of answers": check_ends(model, tokenizer, skeleton.get_input_embeddings().weight.shape[0]),
        "softmax scale": check_softmax_scale(skeleton),
        "routing": check_routing(skeleton.config),
        "experts' implementations": check_experts(skeleton),
        "checkpoint": check_checkpoint(skeleton, Path(model.path) if model.init == "pretrained" else None),
    }
    if rollout is not None:
        findings["vLLM"] = check_served(skeleton, model.dtype, rollout)
    return [Check(name, *finding) for name, finding in findings.items()]


def check_round_trip(tokenizer: Any) -> Finding:
    """Spaces, newlines, digits and other scripts survive encoding and decoding."""
    ids = tokenizer(ROUND_TRIP, add_special_tokens=False)["input_ids"]
    back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if back == ROUND_TRIP:
        return OK, f"{len(ids)} tokens and back, unchanged"
    return FAILED, (
        f"{ROUND_TRIP!r} comes back as {back!r}. Known cause: a tokenizer class that replaces the pre-tokenizer of its "
        "tokenizer.json (transformers 5 does for some Llama tokenizers). Cure: set "
        '"tokenizer_class": "PreTrainedTokenizerFast" in tokenizer_config.json'
    )


def check_template(tokenizer: Any) -> Finding:
    """One BOS at most, and a forged role or special token in a message stays text."""
    forged = f"{tokenizer.bos_token or ''}x{tokenizer.eos_token}"
    try:
        plain = encode_prompt(tokenizer, [{"role": "user", "content": "x"}])
    except UserError as error:
        return FAILED, str(error)
    try:
        encode_prompt(tokenizer, [{"role": "user", "content": forged}])
    except UserError as error:
        return FAILED, f"{error}. Cure: a fast tokenizer (tokenizer.json), which knows split_special_tokens"
    bos, ends = tokenizer.bos_token_id, plain.count(tokenizer.eos_token_id)
    if bos is not None and plain.count(bos) > 1 + ends:
        return FAILED, "the prompt begins with two BOS tokens. Cure: take one out of the template"
    limits = ""
    try:
        encode_prompt(tokenizer, [{"role": "system", "content": "x"}, {"role": "user", "content": "x"}])
    except UserError as error:
        limits = f"; data with system messages cannot be used: {error}"
    return OK, f"{len(plain)} tokens around a message; special tokens in a message stay text{limits}"


def check_demonstrations(tokenizer: Any) -> Finding:
    """An answer, and an answer with a thought, can be trained on as the template renders them."""
    refused = {}
    for kind, response in {"": "x", " with a thought": "<think>\nx\n</think>\n\nx"}.items():
        try:
            encode_example(tokenizer, [{"role": "user", "content": "x"}], response)
        except UserError as error:
            refused[kind] = str(error)
    if not refused:
        return OK, "trained on as the template renders them, with a thought and without"
    if len(refused) == 2:
        return LIMITED, f"no SFT and no reward model: {refused['']}"
    (kind, reason), *_ = refused.items()
    return LIMITED, f"no SFT and no reward model on answers{kind or ' without a thought'}: {reason}"


def check_ends(model: ModelOptions, tokenizer: Any, rows: int) -> Finding:
    """An answer ends with a token that the model has an embedding for, of `rows`, and that sampling stops at."""
    try:
        end = turn_end(tokenizer)
    except UserError:
        return SKIPPED, "the chat template cannot be rendered"
    try:
        ends, text = stop_token_ids(model, tokenizer), text_after_answer(tokenizer)
    except UserError as error:
        return FAILED, str(error)
    if beyond := [stop for stop in ends if stop >= rows]:
        return FAILED, (
            f"the end of sequence {beyond[0]} is beyond the {rows} rows of the model's embedding. Cause: generation_config.json or "
            "config.json is of another model. Cure: set eos_token_id there to the tokenizer's"
        )
    names = [tokenizer.convert_ids_to_tokens(stop) for stop in ends]
    written = re.search(r"<\|[^|<>\s]+\|>", text)
    if written and not any(name in text for name in names):
        return FAILED, (
            f"the chat template ends an answer with {written[0]}, which is no token of this tokenizer, so that the model would never stop. "
            "Cause: a template or a tokenizer of another model. Cure: take both from the same model"
        )
    return (
        OK,
        f"an answer ends with {tokenizer.convert_ids_to_tokens(end)}; sampling stops at {' and '.join(names)}",
    )


def text_after_answer(tokenizer: Any) -> str:
    """What the chat template writes behind an answer; "" where it renders none."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": ROUND_TRIP.strip()}]
    try:
        before, _, after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(ROUND_TRIP.strip())
    # A template's own errors are jinja's, and whatever its expressions raise; `check_demonstrations` tells them.
    except Exception:
        return ""
    return str(after) if before else ""


def check_softmax_scale(skeleton: Any) -> Finding:
    """YaRN's correction of the softmax scale is applied (left out by transformers 4.54 to 5.14 for DeepSeek-V2)."""
    config = skeleton.config
    rope = getattr(config, "rope_parameters", None) or {}
    attention = next((m for m in skeleton.modules() if hasattr(m, "qk_head_dim") and hasattr(m, "scaling")), None)
    if attention is None or rope.get("rope_type") != "yarn" or not rope.get("mscale_all_dim"):
        return SKIPPED, "the model has no YaRN correction of the softmax scale"
    # YaRN's attention factor (Peng et al. 2023, arXiv 2309.00071, eq. 22).
    mscale = 0.1 * rope["mscale_all_dim"] * math.log(max(rope["factor"], 1.0)) + 1.0
    expected = attention.qk_head_dim**-0.5 * mscale**2
    if abs(attention.scaling - expected) < 1e-6:
        return OK, f"{expected:.7f}, YaRN's correction included"
    return FAILED, (
        f"is {attention.scaling:.7f}, but YaRN's correction makes it {expected:.7f}. Cause: a transformers older than 5.15. "
        "Cure: install the versions of the lock file (make setup)"
    )


def check_routing(config: Any) -> Finding:
    """transformers and vLLM choose and weight the experts alike: of DeepSeek-V2's options they read two differently."""
    if config.model_type != "deepseek_v2":
        return SKIPPED, "only DeepSeek-V2's configuration can be read in two ways"
    groups = config.n_group or 1
    if config.topk_method == "greedy" and groups > 1:
        wrong = (
            f"topk_method is greedy and n_group {groups}: vLLM takes experts from the best groups alone, transformers from all. "
            'Cure: "n_group": 1 and "topk_group": 1 in config.json, or "topk_method": "group_limited_greedy", as the model was trained'
        )
    elif config.norm_topk_prob:
        wrong = (
            "norm_topk_prob is true: vLLM divides the weights of a token's experts by their sum, transformers does not. "
            'Cure: "norm_topk_prob": false in config.json if the model was trained so; otherwise it cannot be trained here'
        )
    else:
        return OK, f"{config.topk_method}, which sampler and learner compute alike"
    return FAILED, wrong


def check_experts(skeleton: Any) -> Finding:
    """The ways transformers computes experts agree, on the model's own routing with few and narrow layers."""
    if not has_fused_experts(skeleton):
        return SKIPPED, "the model has no fused experts"
    config = deepcopy(skeleton.config)
    config.num_hidden_layers = getattr(config, "first_k_dense_replace", 0) + 1
    for width in ("intermediate_size", "moe_intermediate_size"):
        if hasattr(config, width):
            setattr(config, width, min(getattr(config, width), 64))
    config.vocab_size = 64
    config.pad_token_id = config.bos_token_id = config.eos_token_id = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = type(skeleton)(config).float().eval()
        token_ids = torch.randint(0, 64, (2, 16))
    logits = {}
    for implementation in ("eager", "grouped_mm"):
        model.set_experts_implementation(implementation)
        with torch.no_grad():
            logits[implementation] = model(input_ids=token_ids, use_cache=False).logits
    apart = float((logits["eager"] - logits["grouped_mm"]).abs().max())
    if apart < EXPERT_TOLERANCE:
        return OK, f"eager and grouped_mm differ by {apart:.0e}"
    return FAILED, (
        f"eager and grouped_mm differ by {apart:.1e} in the logits. Cause: a transformers whose experts are wrong. "
        "Cure: install the versions of the lock file (make setup)"
    )


def check_checkpoint(skeleton: Any, directory: Path | None) -> Finding:
    """The files, where there is a directory with any, are whole and not quantised; their tensors have the names and shapes of the model's
    parameters, which map to the checkpoint's and back."""
    if quantised := getattr(skeleton.config, "quantization_config", None):
        kind = quantised.get("quant_method") if isinstance(quantised, dict) else type(quantised).__name__
        return (
            FAILED,
            f"the weights are quantised ({kind}) and cannot be trained. Cure: take the model before it was quantised",
        )
    tied = tied_names(skeleton)
    own = {n: tuple(p.shape) for n, p in skeleton.named_parameters() if n not in tied}
    layout = layout_of(skeleton.config.model_type)
    split = dict(to_checkpoint(((n, p) for n, p in skeleton.named_parameters() if n not in tied), layout))
    back = {n: tuple(t.shape) for n, t in from_checkpoint(split, layout).items()}
    if back != own:
        wrong = sorted({n for n in own.keys() | back.keys() if own.get(n) != back.get(n)})
        return FAILED, f"{wrong[0]} and {len(wrong) - 1} more do not survive the way to checkpoint names"
    try:
        stored = stored_shapes(directory) if directory else {}
    except UserError as error:
        return FAILED, str(error)
    extra = stored.keys() - {*split, *tied, *(name for name, _ in persistent_buffers(skeleton))}
    ignored = getattr(skeleton, "_keys_to_ignore_on_load_unexpected", None) or ()
    aside = {name for name in extra if any(re.search(pattern, name) for pattern in ignored)}
    unknown, absent = extra - aside, split.keys() - stored
    if (unknown or absent) and (otherwise := sorted(split.keys() ^ saved_names(skeleton, own))):
        return FAILED, (
            f"checkpoints of {type(skeleton).__name__} call {otherwise[0]} otherwise. Cause: an architecture whose names are not known here, so "
            "that the sampler could not take new weights. Cure: another architecture"
        )
    if stored and (unknown or absent):
        return FAILED, (
            f"the files have {len(unknown)} tensors that the architecture does not know and lack {len(absent)} that it "
            f"needs, {min(unknown or absent)} for one. Cause: another architecture, or a checkpoint saved by an incompatible version. "
            "Cure: save it again with save_pretrained"
        )
    for name, tensor in split.items():
        if stored and stored[name] != tuple(tensor.shape):
            return FAILED, (
                f"{name} is {list(stored[name])} in the files and {list(tensor.shape)} by config.json. Cause: a config.json of another "
                "model, or one that was edited. Cure: take both from the same model"
            )
    more = f"; {len(aside)} more, {min(aside)} for one, are not trained, and not in what is saved" if aside else ""
    where = f"and are those of the files{more}" if stored else "(no local files to compare with)"
    return OK, f"{len(own)} parameters are {len(split)} tensors and back {where}"


def saved_names(skeleton: Any, parameters: Collection[str]) -> Collection[str]:
    """What transformers calls these parameters in the checkpoints that it writes."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(skeleton, {n: p for n, p in skeleton.named_parameters() if n in parameters}).keys()


def check_served(skeleton: Any, dtype: str, rollout: FleetOptions) -> Finding:
    """vLLM knows the architecture, and takes its heads, its dtype and the options of the sampler on this machine.

    On the nodes of a cluster, which need not be like this one, the workers themselves refuse what their devices do not take.
    """
    here = not cluster_address()
    config = skeleton.config.get_text_config()
    name, heads = type(skeleton).__name__, config.num_attention_heads
    positions = positions_of(config)
    rope = getattr(config, "rope_parameters", None) or {}
    if latent := getattr(config, "kv_lora_rank", None):  # of a head, vLLM keeps the latent and the rotary key
        of, size, cpu_sizes = "kv_lora_rank + qk_rope_head_dim", latent + config.qk_rope_head_dim, CPU_LATENTS
    else:
        widths = (getattr(layer, "head_dim", None) or layer.hidden_size // heads for layer in config.per_layer_config)
        of, size, cpu_sizes = "a head", max(widths), CPU_HEADS
    refused = ""
    if not skeleton.config.architectures:
        refused = f'config.json names no architectures, without which vLLM loads no head. Cure: "architectures": ["{name}"] there'
    elif not is_known_to_vllm(skeleton):
        import vllm  # the name of its package for CPUs is another

        refused = (
            f"vLLM {vllm.__version__} has no {skeleton.config.architectures[0]}. Cure: a model of another architecture"
        )
    elif here and not torch.cuda.is_available() and size not in cpu_sizes:
        takes = ", ".join(map(str, cpu_sizes))
        refused = f"{of} is {size} wide, and vLLM takes {takes} on a CPU. Cure: a model with another head_dim, or a GPU"
    elif rollout.max_length > positions:
        refused = (
            f"rollout.max_length is {rollout.max_length}, and the model has {positions:.0f} positions. Cure: lower it to {positions:.0f}"
            f"{cure_of_yarn(rope, positions)}"
        )
    elif rope.get("rope_type") == "longrope" and rollout.max_length > (short := short_positions(config)):
        refused = (
            f"rollout.max_length is {rollout.max_length}, and the model's LongRoPE has other factors for more than {short} positions, which vLLM then "
            f"takes for all sequences, and the learner for long ones alone. Cure: at most {short}"
        )
    elif heads % rollout.tensor_parallel:
        refused = f"rollout.tensor_parallel is {rollout.tensor_parallel}, and {heads} heads cannot be divided by it. Cure: a divisor of {heads}"
    elif rollout.gpus < 1 or (here and not torch.cuda.is_available()):
        refused = small_cache(config, dtype, rollout)
    if here and not refused:
        refused = refusal(dtype, rollout, Device.here())
    return (FAILED, refused) if refused else (OK, f"takes {skeleton.config.architectures[0]} with heads of {size}")


def small_cache(config: Any, dtype: str, rollout: EngineOptions) -> str:
    """Why a sequence has no room in the KV cache of `rollout.kv_cache_gb`; empty where it has."""
    needed, cache = sequence_bytes(config, dtype, rollout), rollout.kv_cache_gb * GIB
    cure = "raise rollout.kv_cache_gb, or lower rollout.max_length"
    return lacks_cache(rollout.max_length, needed, cache, cure) if cache < needed else ""


def sequence_bytes(config: Any, dtype: str, rollout: EngineOptions, spare: int = 0) -> float:
    """Bytes that a sequence of `max_length` and `spare` tokens takes in the KV cache of each of a worker's processes."""
    processes = 1 if getattr(config, "kv_lora_rank", None) else rollout.tensor_parallel
    return (rollout.max_length + spare) * kv_elements(config) * ELEMENT_BYTES[dtype] / processes


def with_room(config: Any, dtype: str, options: Options) -> Options:
    """The options with a KV cache that holds a sequence, where nobody chose its size."""
    if not has_attention(config):
        return options
    needed = sequence_bytes(config.get_text_config(), dtype, options, SPARE_TOKENS) / GIB
    return options.model_copy(update={"kv_cache_gb": max(options.kv_cache_gb, needed)})


def positions_of(config: Any) -> float:
    """How many positions vLLM takes of a model by its configuration; infinite where that does not say."""
    longest: float = (
        getattr(config, "model_max_length", None) or getattr(config, "max_position_embeddings", None) or math.inf
    )
    rope = getattr(config, "rope_parameters", None) or {}
    ropes = [each for each in rope.values() if isinstance(each, dict)] or [rope]  # of kinds of layers, or one of all
    factors = [each["factor"] for each in ropes if each.get("factor") and each.get("rope_type") not in STRETCHED]
    return longest * factors[-1] if factors and "gemma3" not in config.model_type else longest


def cure_of_yarn(rope: dict[str, Any], positions: float) -> str:
    """What else helps where `max_position_embeddings` is not the length that YaRN stretches a model to."""
    before, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
    stretched = int(before * factor) if before and factor and rope.get("rope_type") == "yarn" else 0
    if stretched <= positions:
        return ""
    return f", or set max_position_embeddings in config.json to {stretched}, to which YaRN stretches the model"


def short_positions(config: Any) -> int:
    """Up to how many positions LongRoPE has the factors of short sequences."""
    rope = config.rope_parameters
    before = getattr(config, "original_max_position_embeddings", None) or rope.get("original_max_position_embeddings")
    return int(before or config.max_position_embeddings)


def is_known_to_vllm(skeleton: Any) -> bool:
    """Whether vLLM can load the architecture: through transformers, or by a class of its own."""
    if skeleton.is_backend_compatible():
        return True
    from vllm.model_executor.models.registry import ModelRegistry

    return skeleton.config.architectures[0] in ModelRegistry.get_supported_archs()


def verdict(checks: Sequence[Check], path: str) -> str:
    """One plain sentence. Raises DoctorError when a check failed."""
    failed = [check for check in checks if check.status is FAILED]
    if len(failed) == 1:
        raise DoctorError(f"{path} is not fit to be trained: {failed[0].name}: {failed[0].detail}")
    if failed:
        told = "\n".join(f"- {check.name}: {check.detail}" for check in failed)
        raise DoctorError(f"{path} is not fit to be trained: {len(failed)} of {len(checks)} checks failed\n{told}")
    limits = "".join(f"; {check.detail}" for check in checks if check.status is LIMITED)
    return f"{path} is fit to be trained: {len(checks)} checks, none failed{limits}"
