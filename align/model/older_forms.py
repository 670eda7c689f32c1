"""What transformers 5 writes under new names, also under those that transformers 4 and programs of its time read.

Without them transformers 4.57 refuses the tokenizer ("TokenizersBackend does not exist"), and takes a rotary base of 10,000 and no
YaRN without a word.
"""

import json
from pathlib import Path
from typing import Any

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
    if "partial_rotary_factor" in rope:
        older["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if config.attribute_map.get("num_experts") in written:
        older["num_experts"] = written[config.attribute_map["num_experts"]]
    return older


def _older_tokenizer(written: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    older: dict[str, Any] = {}
    if written.get("tokenizer_class") == NEW_CLASS:
        base = get_tokenizer_config(tokenizer.name_or_path).get("tokenizer_class") if tokenizer.name_or_path else None
        older["tokenizer_class"] = OLD_CLASS if base in (None, NEW_CLASS) else base
    extra = written.get("extra_special_tokens")
    if isinstance(extra, list):
        older |= {"additional_special_tokens": extra, "extra_special_tokens": {}}
    return older
