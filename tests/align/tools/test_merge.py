"""What `align merge` writes computes what base and adapter compute, wherever the adapter is; else there is nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from align.errors import UserError
from align.model.policy import load_tokenizer
from align.tools import merge
from align.tools.merge import merge_adapter

from ..small_models import small_config

NANO = Path(__file__).parents[3] / "recipes/nano/policy"
IDS = torch.tensor([[3, 5, 8, 13, 21, 34, 55]])


def base(directory: Path, *, tied: bool, rows: int = 0) -> Path:
    """A tiny Llama with the nano tokenizer."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(NANO)
    config = LlamaConfig(
        vocab_size=rows or len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def adapted(origin: Path, adapter: Path, grown: int = 0, **options: Any) -> torch.Tensor:
    """Save an adapter in which nothing is zero; the logits of its base with it."""
    model = AutoModelForCausalLM.from_pretrained(origin)
    if grown:
        model.resize_token_embeddings(grown, mean_resizing=False)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, **options))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(adapter)
    return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 5]}},
        {"target_modules": "all-linear"},
    ],
    ids=["head", "embedding", "both", "a copy of the embedding", "a copy of the head", "tokens", "neither"],
)
def test_head_and_embedding_are_each_what_they_were_with_the_adapter(
    tied: bool, options: dict[str, Any], tmp_path: Path
) -> None:
    origin = base(tmp_path / "base", tied=tied)
    expected = adapted(origin, tmp_path / "adapter", **options)
    merge_adapter(tmp_path / "adapter", tmp_path / "out", str(origin))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(merged(input_ids=IDS).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("copied", [None, ["embed_tokens", "lm_head"]])
def test_an_adapter_with_added_tokens_brings_its_embedding(
    tied: bool, copied: list[str] | None, tmp_path: Path
) -> None:
    origin = base(tmp_path / "base", tied=tied)
    tokenizer = AutoTokenizer.from_pretrained(origin)
    tokenizer.add_tokens(["<think>", "</think>"])
    expected = adapted(
        origin, tmp_path / "adapter", grown=len(tokenizer), target_modules=["q_proj"], modules_to_save=copied
    )
    tokenizer.save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "out", str(origin))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(merged(input_ids=IDS).logits, expected, atol=1e-4, rtol=1e-4)
    assert load_tokenizer(tmp_path / "out").convert_tokens_to_ids("</think>") == len(tokenizer) - 1


def test_a_checkpoint_that_computes_something_else_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    origin = base(tmp_path / "base", tied=True)
    adapted(origin, tmp_path / "adapter", target_modules=["lm_head"])
    monkeypatch.setattr(merge, "prepare_embeddings", lambda *_: None)
    with pytest.raises(UserError, match=r"another model than was to be written.*logits are off by"):
        merge_adapter(tmp_path / "adapter", tmp_path / "out", str(origin))
    assert [p.name for p in tmp_path.iterdir() if "out" in p.name] == []


def test_an_adapter_that_is_cut_off_or_a_pointer_says_so(tmp_path: Path) -> None:
    origin = base(tmp_path / "base", tied=False)
    adapted(origin, tmp_path / "adapter", target_modules=["q_proj"])
    (tmp_path / "adapter" / "adapter_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is cut off, damaged, or a pointer of Git LFS"):
        merge_adapter(tmp_path / "adapter", tmp_path / "out", str(origin))


def test_a_base_that_is_quantised_is_refused_where_nothing_reads_it(tmp_path: Path) -> None:
    origin = base(tmp_path / "base", tied=True)
    adapted(origin, tmp_path / "adapter", target_modules=["q_proj"])
    file = origin / "config.json"
    quantised = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": quantised}))
    with pytest.raises(
        UserError, match=r"cannot load its base .*; give the model as it was before it was quantised with --base"
    ):
        merge_adapter(tmp_path / "adapter", tmp_path / "out", str(origin))


NAMED = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""What adapters made with transformers 4, whose experts are layers of their own, mostly name."""


def adapted_by_older_peft(
    directory: Path,
    architecture: str,
    adapts: str,
    *,
    named: tuple[str, ...] = NAMED,
    rslora: bool = False,
    **changed: Any,
) -> dict[str, torch.Tensor]:
    """Save a small base and an adapter as transformers 4 had it, of the layers named so that have `adapts` in their names; the sum of both."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(NANO)
    config = small_config(architecture, vocab_size=len(tokenizer), **changed)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory / "base")
    tokenizer.save_pretrained(directory / "base")
    weights, saved = load_file(directory / "base" / "model.safetensors"), {}
    for name, weight in weights.items():
        layer = name.removesuffix(".weight")
        if layer != name and layer.endswith(named) and adapts in name:
            a, b = torch.randn(4, weight.shape[1]), torch.randn(weight.shape[0], 4)
            saved |= {f"base_model.model.{layer}.lora_A.weight": a, f"base_model.model.{layer}.lora_B.weight": b}
            weights[name] = weight + 2 / (4**0.5 if rslora else 4) * b @ a
    LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(directory / "base"),
        r=4,
        lora_alpha=2,
        lora_dropout=0.05,
        use_rslora=rslora,
        target_modules=[f"{adapts}{name}" for name in named],
    ).save_pretrained(directory / "adapter")
    save_file(saved, directory / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    return weights


@pytest.mark.parametrize(("adapts", "rslora"), [("", False), ("", True), ("shared_experts.", False)])
def test_an_adapter_of_transformers_4_is_merged_into_dense_shared_and_routed_layers(
    adapts: str, rslora: bool, tmp_path: Path
) -> None:
    expected = adapted_by_older_peft(tmp_path, "DeepSeek-V2", adapts, rslora=rslora, first_k_dense_replace=1)
    merge_adapter(tmp_path / "adapter", tmp_path / "out")
    torch.testing.assert_close(load_file(tmp_path / "out" / "model.safetensors"), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["Mixtral", "Qwen3-MoE"])
def test_an_adapter_of_transformers_4_may_be_of_routers_without_experts(architecture: str, tmp_path: Path) -> None:
    expected = adapted_by_older_peft(tmp_path, architecture, "", named=("q_proj", ".gate"))
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('".gate"', '"gate"'))
    merge_adapter(tmp_path / "adapter", tmp_path / "out")
    torch.testing.assert_close(load_file(tmp_path / "out" / "model.safetensors"), expected, atol=1e-4, rtol=1e-4)


def test_an_adapter_that_peft_would_read_in_part_is_refused(tmp_path: Path) -> None:
    adapted_by_older_peft(tmp_path, "Qwen2-MoE", "")
    with pytest.raises(UserError, match=r"no place in .* for 8 of its tensors, .*layers\.0\.mlp\.experts\..* for one"):
        merge_adapter(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_beside_an_adapter_is_read_as_its_file_says(tmp_path: Path) -> None:
    """Versions 4 of transformers, and what trains with them, save it there, where no configuration says of which model it is."""
    origin = base(tmp_path / "base", tied=False)
    adapted(origin, tmp_path / "adapter", target_modules=["q_proj"])
    tokenizer = load_tokenizer(origin)
    tokenizer.save_pretrained(tmp_path / "adapter")
    named = tmp_path / "adapter" / "tokenizer_config.json"
    named.write_text(json.dumps(json.loads(named.read_text()) | {"tokenizer_class": "LlamaTokenizerFast"}))
    merge_adapter(tmp_path / "adapter", tmp_path / "out")
    text = "a  17 and more"
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text)["input_ids"] == tokenizer(text)["input_ids"]
