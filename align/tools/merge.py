"""`align merge`: an adapter that PEFT wrote, and its base, as one checkpoint that computes what both compute together."""

import json
import math
import re
import shutil
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from align.errors import UserError
from align.model.lora import ADAPTER, ADAPTER_DIRECTORY
from align.model.policy import check_written, first_line, load_tokenizer, no_progress_bars, probe_logits, save_policy
from align.model.reward_model import head_options
from align.run.files import refuse_existing, whole_directory
from reward.learned import NOTES

WEIGHTS = "adapter_model.safetensors"


def merge_adapter(adapter: Path, out: Path, base: str | None = None, dtype: str | None = None) -> str:
    """Write base and adapter as one Hugging Face checkpoint to `out`; returns where the base came from, and the dtype that the sum is rounded to.

    `base` is used in place of the one that the adapter names, `dtype` of the base's own. What was written is loaded again and compared with what base and adapter
    compute. Raises UserError where they do not belong together, or the checkpoint differs from them; there is no `out` then.
    """
    config = read_adapter_config(adapter)
    refuse_existing(out)
    origin = base or config["base_model_name_or_path"]
    if Path(origin).is_absolute() and not Path(origin).is_dir():
        raise UserError(f"{adapter}: its base {origin} is not there (any more); say with --base where it is now")
    try:
        tokenizer = load_tokenizer(adapter if (adapter / "tokenizer.json").is_file() else origin)
    except UserError as error:
        raise UserError(f"{adapter}: its base cannot be read ({error}); say with --base where it is") from None
    model = load_base(adapter, config, origin, dtype or "auto", tokenizer)
    rounded = str(model.dtype).removeprefix("torch.")
    check_names(adapter, config, model, origin)
    prepare_embeddings(model, adapter, config)
    adapted = add_saved_adapter(model, adapter, origin)
    expected = probe_logits(adapted)
    whole = adapted.merge_and_unload()
    with whole_directory(out.absolute()) as written:
        save_policy(whole, tokenizer, written)
        if (notes := adapter.absolute().parent / NOTES).is_file():  # of a reward model, which is read by them
            shutil.copy(notes, written)
        del model, adapted, whole
        check_written(written, expected)
    return f"{origin}, in {rounded}"


def load_base(adapter: Path, config: Mapping[str, Any], origin: str, dtype: str, tokenizer: Any) -> Any:
    """The adapter's base, a policy or a reward model. Raises UserError where it cannot be loaded."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    classifies = config["task_type"] == "SEQ_CLS"
    kind = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
    head: dict[str, Any] = {"num_labels": 1} if classifies else {}
    if classifies:
        with suppress(UserError):  # a tokenizer without a token to pad with, which no training here had
            head = head_options(tokenizer, origin)
    try:
        with no_progress_bars():
            return kind.from_pretrained(origin, dtype=dtype, **head)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        cure = (
            "; give the model as it was before it was quantised with --base" if "quanti" in str(error).lower() else ""
        )
        raise UserError(f"{adapter}: transformers cannot load its base {origin}: {first_line(error)}{cure}") from None


def add_saved_adapter(model: Any, adapter: Path, origin: str) -> Any:
    """The base with the adapter that was saved. Raises UserError where the adapter is not for this base, or PEFT would leave a part of it aside."""
    from peft import PeftConfig, PeftModel

    try:
        config: Any = PeftConfig.from_pretrained(str(adapter))
        config.lora_dropout = 0.0  # which PEFT refuses for experts, and a merged model has not
        name_moved_layers(config, model, adapter)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapted = PeftModel.from_pretrained(model, str(adapter), config=config)
        # Loaded once more, because PEFT tells only here which tensors of the file it has not used.
        unexpected = adapted.load_adapter(str(adapter), ADAPTER).unexpected_keys
    except (RuntimeError, ValueError, UserWarning) as error:
        shapes = re.search(r"size mismatch for .*", str(error))
        raise UserError(f"{adapter}: is not for {origin}: {shapes[0] if shapes else first_line(error)}") from None
    # A copy of an embedding is in the file twice.
    if unused := [key for key in unexpected if ".lora_" in key]:
        raise UserError(
            f"{adapter}: PEFT finds no place in {origin} for {len(unused)} of its tensors, {unused[0]} for one; "
            "merge it with the versions of PEFT and transformers that it was trained with"
        )
    return adapted


def name_moved_layers(config: Any, model: Any, adapter: Path) -> None:
    """Name, as parameters, the dense and shared layers of a saved adapter: PEFT would take them for the experts alone, which share their names."""
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    with safe_open(adapter / WEIGHTS, framework="pt") as tensors:
        saved = {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in list(tensors.keys())}
    given, scaled = config.target_parameters or [], set(config.alpha_pattern)
    convert_peft_config_for_transformers(config, model, None)
    if config.use_rslora:  # PEFT has multiplied alpha like the rank, of which this scale has the root
        for name in config.alpha_pattern.keys() - scaled:
            config.alpha_pattern[name] = config.lora_alpha * math.sqrt(config.rank_pattern[name] / config.r)
    if not config.target_parameters:
        return
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    moved = [f"{n}.weight" for n in linear if n in saved and not check_target_module_exists(config, n)]
    experts, routers = any(".experts" in name for name in saved), any(name.endswith(".gate") for name in saved)
    kept = [p for p in config.target_parameters if p in given or (routers if p == "gate.weight" else experts)]
    config.target_parameters = list(dict.fromkeys([*kept, *moved]))


def prepare_embeddings(model: Any, adapter: Path, config: Mapping[str, Any]) -> None:
    """Give a base the size of embedding that the adapter was trained with, and untie a head from it where one of them is adapted.

    An adapter of a grown vocabulary holds its embedding as a whole. In a tied head, what is merged into one would change the other.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if module is embedding or module is head]
    try:
        with safe_open(adapter / WEIGHTS, framework="pt") as tensors:
            shapes = {
                k.removeprefix("base_model.model."): tensors.get_slice(k).get_shape() for k in list(tensors.keys())
            }
    except SafetensorError as error:
        raise UserError(
            f"{adapter / WEIGHTS} is cut off, damaged, or a pointer of Git LFS ({error}): copy it again"
        ) from None
    wholes = [f"{name}{middle}.weight" for name in names for middle in ("", ".base_layer")]
    rows = max((shapes[key][0] for key in wholes if key in shapes), default=embedding.num_embeddings)
    if rows != embedding.num_embeddings:
        model.resize_token_embeddings(rows, mean_resizing=False)
    copied = {name.split(".")[-1] for name in config.get("modules_to_save") or ()}
    adapted = any(key.startswith(tuple(f"{name}.lora_" for name in names)) for key in shapes)
    text = model.config.get_text_config()
    if head is not None and text.tie_word_embeddings and (adapted or copied & {n.split(".")[-1] for n in names}):
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = text.tie_word_embeddings = False


def read_adapter_config(adapter: Path) -> dict[str, Any]:
    """An adapter's `adapter_config.json`. Raises UserError for a directory that holds no LoRA adapter."""
    file = adapter / "adapter_config.json"
    if not file.is_file() or not (adapter / "adapter_model.safetensors").is_file():
        inside = adapter / ADAPTER_DIRECTORY
        hint = f"; did you mean {inside}?" if inside.is_dir() else ""
        raise UserError(f"{adapter} is no adapter of PEFT (adapter_config.json and adapter_model.safetensors){hint}")
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if config["peft_type"] != "LORA":
            raise UserError(f"{file}: is an adapter of the kind {config['peft_type']}, not LORA")
        config["base_model_name_or_path"], config["task_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: cannot be read as the configuration of an adapter: {error!r}") from None
    return config


def check_names(adapter: Path, config: Mapping[str, Any], base: Any, origin: str) -> None:
    """Raise UserError where an adapter names, in full, parameters that its base does not have."""
    names = {name for name, _ in base.named_parameters()}
    targets = [*(f"{m}.weight" for m in config["target_modules"] or []), *(config.get("target_parameters") or [])]
    absent = sorted(target for target in targets if ".layers." in target and target not in names)
    if absent:
        raise UserError(
            f"{adapter}: is not for {origin}, which lacks {len(absent)} of what it adapts, {absent[0]} for one"
        )
