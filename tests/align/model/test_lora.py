"""Adapters: where they go, what they do to the weights, and how they are merged; the mistakes that users make with them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from align.cli import main
from align.errors import UserError
from align.model.lora import (
    AddedOnce,
    adapted_modules,
    adapter_layers,
    add_adapter,
    factors,
    is_adapter,
    merged,
    plain_parameters,
    save_adapter,
    update_of,
)
from align.model.policy import load_policy, load_tokenizer, save_policy, write_random_policy
from align.model.reward_model import load_reward_model
from align.recipe import LoraOptions, ModelOptions, check_model_directory
from align.tools.merge import merge_adapter

IDS = torch.arange(3, 43).reshape(2, 20)
LAYERS, MOE = range(4), (1, 2, 3)
ATTENTION = {
    f"model.layers.{i}.self_attn.{n}.weight" for i in LAYERS for n in ("q_proj", "kv_a_proj_with_mqa", "o_proj")
}
MLP = ("gate_proj", "up_proj", "down_proj")
SHARED = {f"model.layers.{i}.mlp.shared_experts.{n}.weight" for i in MOE for n in MLP}
DENSE = {f"model.layers.0.mlp.{n}.weight" for n in MLP}
EXPERTS = {f"model.layers.{i}.mlp.experts.{n}" for i in MOE for n in ("gate_up_proj", "down_proj")}


def adapted(policy: ModelOptions, *targets: str, perturbed: bool = True, **options: Any) -> Any:
    """The policy with an adapter of which neither factor is zero."""
    lora = LoraOptions(rank=4, targets=list(targets) or ["attention"], **options)
    torch.manual_seed(0)
    model = add_adapter(load_policy(policy), lora, "CAUSAL_LM", policy.path)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if perturbed and is_adapter(name):
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def saved(model: Any, directory: Path) -> Path:
    save_adapter(model, directory, {n: p.detach() for n, p in model.named_parameters() if p.requires_grad})
    return directory


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["attention"], ATTENTION),
        (["all-linear"], ATTENTION | SHARED | DENSE),
        (["experts"], EXPERTS),
        (["attention", "experts.down_proj"], ATTENTION | {n for n in EXPERTS if n.endswith("down_proj")}),
        (["shared_experts.up_proj"], {n for n in SHARED if "up_proj" in n}),
        (["kv_b_proj"], {f"model.layers.{i}.self_attn.kv_b_proj.weight" for i in LAYERS}),
        (["mlp.gate"], {f"model.layers.{i}.mlp.gate.weight" for i in MOE}),
        (["model.layers.2.self_attn.q_proj"], {"model.layers.2.self_attn.q_proj.weight"}),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else "",
)
def test_targets_are_adapted_where_they_are_and_nothing_else_is(
    policy: ModelOptions, targets: list[str], expected: set[str]
) -> None:
    model = adapted(policy, *targets)
    assert adapter_layers(model).keys() == expected
    assert all(p.requires_grad == is_adapter(name) for name, p in model.named_parameters())


def test_an_unknown_target_is_refused_with_the_names_that_there_are(policy: ModelOptions) -> None:
    with pytest.raises(
        UserError, match=r"'q_porj'; there are the presets all-linear, attention.*self_attn\.q_proj.*mlp\.gate"
    ):
        adapted(policy, "attention", "q_porj")
    with pytest.raises(UserError, match="lm_head"):
        adapted(policy, "lm_head")


def test_dropout_is_for_attention_alone(policy: ModelOptions) -> None:
    adapted(policy, "attention", dropout=0.1)
    with pytest.raises(UserError, match=r"dropout must be 0 for adapters of mlp\.experts"):
        adapted(policy, "attention", "experts", dropout=0.1)


def test_a_new_adapter_changes_nothing(policy: ModelOptions) -> None:
    before = load_policy(policy)(input_ids=IDS, use_cache=False).logits
    after = adapted(policy, "attention+shared", "experts", perturbed=False)(input_ids=IDS, use_cache=False).logits
    assert torch.equal(before, after)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_weights_are_those_of_peft_and_leave_the_base_as_it_was(policy: ModelOptions, dtype: str) -> None:
    base = policy.model_copy(update={"dtype": dtype})
    model = adapted(base, "attention+shared", "experts", "mlp.gate")
    layers, own = adapter_layers(model), plain_parameters(model)
    found = {name: merged(p, layers[name]) if name in layers else p.detach() for name, p in own.items()}
    before = dict(load_policy(base).named_parameters())
    assert own.keys() == before.keys()
    assert all(torch.equal(own[name], parameter) for name, parameter in before.items())
    for name, parameter in model.merge_and_unload().named_parameters():
        # PEFT rounds the product to bfloat16 before it adds it.
        rtol, atol = (1.6e-2, 1e-3) if dtype == "bfloat16" else (1e-6, 1e-7)
        torch.testing.assert_close(found[name], parameter.detach(), rtol=rtol, atol=atol)
        assert torch.equal(found[name], before[name]) == (name not in layers)


@pytest.mark.parametrize("target", ["shared_experts.up_proj", "q_proj", "kv_a_proj_with_mqa"])
def test_in_bfloat16_a_layer_has_an_adapter_that_its_weights_would_round_away(
    policy: ModelOptions, target: str
) -> None:
    """All weights are 1 and the inputs add up to nothing: a layer gives what its adapter adds."""
    x = opposites(128)
    for layer in small_in_bfloat16(policy, target):
        update = update_of(layer)
        expected = update.scale * x.float() @ (update.b @ update.a).detach().float().T
        assert float((layer(x).detach().float() - expected).norm() / expected.norm()) < 0.02


def test_in_bfloat16_experts_have_an_adapter_that_their_weights_would_round_away(policy: ModelOptions) -> None:
    x, first, whole = opposites(128), torch.zeros(8, 1, dtype=torch.long), torch.ones(8, 1)
    targets = (f"model.layers.1.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj"))
    outer, inner = small_in_bfloat16(policy, *targets)
    both = [
        update.scale * (update.b[0] @ update.a[0]).detach().double()
        for update in map(update_of, sorted((outer, inner), key=lambda layer: layer.parameter_name == "down_proj"))
    ]
    gate, up = (x.double() @ both[0].T).chunk(2, dim=1)
    expected = (torch.nn.functional.silu(gate) * up) @ (1 + both[1]).T
    assert float((outer(x, first, whole).detach().double() - expected).norm() / expected.norm()) < 0.03
    outer.enable_adapters(False)
    assert not outer(x, first, whole).any()


def test_the_gradients_of_the_one_product_are_those_of_the_sum() -> None:
    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    torch.manual_seed(0)
    x, a, b, weight, bias = drawn(2, 3, 5), drawn(2, 5), drawn(4, 2), drawn(4, 5).detach(), drawn(4).detach()
    keep = torch.tensor([0.0, 2, 2, 0, 2], dtype=torch.float64)

    def product(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return AddedOnce.apply(x, x * keep, weight, bias, a, b, 1.5)

    expected = x @ weight.T + bias + 1.5 * (x * keep) @ a.T @ b.T
    torch.testing.assert_close(product(x, a, b), expected)
    assert torch.autograd.gradcheck(product, (x, a, b))


def test_in_bfloat16_what_an_adapter_adds_to_outputs_is_there_on_average(policy: ModelOptions) -> None:
    """PEFT's sum with an output that is rounded already leaves four fifths of it out."""
    model = adapted(
        policy.model_copy(update={"dtype": "bfloat16"}), "q_proj", "shared_experts.up_proj", perturbed=False
    )
    x = torch.randn(512, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    for layer in adapter_layers(model).values():
        before = layer(x)
        a, b = factors(layer)
        b.data = 3e-5 * torch.randn(b.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
        exact = layer.scaling["default"] * x.float() @ (b @ a).detach().float().T
        added = (layer(x) - before).detach().float()
        assert abs(float((added * exact).sum() / exact.square().sum()) - 1) < 0.1


def small_in_bfloat16(policy: ModelOptions, *targets: str) -> list[Any]:
    """The adapter's layers, all weights 1, with an update of each that leaves 1 + s B A at 1 in bfloat16."""
    model = adapted(policy.model_copy(update={"dtype": "bfloat16"}), *targets, perturbed=False)
    layers = list(adapter_layers(model).values())
    for layer in layers:
        factors(layer)[1].data.fill_(1e-3)
        for parameter in layer.get_base_layer().parameters():
            parameter.data = torch.ones_like(parameter)
    return layers


def opposites(width: int) -> torch.Tensor:
    """Inputs [8, width] that add up to nothing."""
    half = torch.randn(8, width // 2, generator=torch.Generator().manual_seed(0)).bfloat16()
    return torch.cat([half, -half], dim=1)


def test_the_blocks_that_change_are_named_once(policy: ModelOptions) -> None:
    assert adapted_modules(adapted(policy, "experts", "model.layers.2.self_attn.q_proj")) == [
        "model.layers.1.mlp.experts",
        "model.layers.2.mlp.experts",
        "model.layers.2.self_attn",
        "model.layers.3.mlp.experts",
    ]
    assert adapted_modules(adapted(policy, "mlp.gate", "experts")) == [f"model.layers.{i}.mlp" for i in MOE]


def test_gradient_checkpointing_changes_no_gradient(policy: ModelOptions) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = adapted(policy, "attention+shared", "experts").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(input_ids=IDS, use_cache=False).logits.square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
        assert gradient.any()


def test_align_merge_writes_a_checkpoint_with_the_log_probabilities_of_base_and_adapter(
    policy: ModelOptions, tmp_path: Path
) -> None:
    model = adapted(policy, "attention+shared", "experts")
    adapter = saved(model, tmp_path / "adapter")
    assert main(["merge", str(adapter), str(tmp_path / "merged")]) == 0
    expected = model(input_ids=IDS, use_cache=False).logits
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(whole, expected, atol=2e-5, rtol=0)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").get_chat_template()
    names = load_file(tmp_path / "merged" / "model.safetensors").keys()
    assert names == load_file(Path(policy.path) / "model.safetensors").keys()


def test_a_reward_model_s_head_is_in_the_adapter_and_in_what_is_merged(policy: ModelOptions, tmp_path: Path) -> None:
    base = load_reward_model(policy, load_tokenizer(policy.path))
    model = add_adapter(base, LoraOptions(rank=4), "SEQ_CLS", policy.path)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "base_model.model.score.modules_to_save.default.weight" in trained
    assert len(trained) == 1 + 2 * len(ATTENTION)
    assert adapted_modules(model)[-1] == "score"
    for name, parameter in model.named_parameters():
        if name in trained:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    expected = model(input_ids=IDS).logits
    adapter = saved(model, tmp_path / "adapter")
    again = AutoModelForSequenceClassification.from_pretrained(policy.path, num_labels=1, pad_token_id=0)
    torch.testing.assert_close(PeftModel.from_pretrained(again, str(adapter))(input_ids=IDS).logits, expected)
    (tmp_path / "reward_model.json").write_text("{}")  # beside the adapter's directory, as in `final/`
    merge_adapter(adapter, tmp_path / "merged")
    assert (tmp_path / "merged" / "reward_model.json").read_text() == "{}"
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (config["pad_token_id"], config["problem_type"]) == (base.config.pad_token_id, "regression")
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(whole(input_ids=IDS).logits, expected, atol=2e-5, rtol=0)


@pytest.fixture
def adapter(policy: ModelOptions, tmp_path: Path) -> Path:
    return saved(adapted(policy, "attention"), tmp_path / "final" / "adapter")


def test_a_directory_that_is_no_adapter_is_refused(policy: ModelOptions, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no adapter of PEFT"):
        merge_adapter(Path(policy.path), tmp_path / "out")
    with pytest.raises(UserError, match=r"did you mean .*final/adapter\?"):
        merge_adapter(adapter.parent, tmp_path / "out")
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"peft_type": "IA3"}))
    with pytest.raises(UserError, match="kind IA3, not LORA"):
        merge_adapter(adapter, tmp_path / "out")
    file.write_text("{")
    with pytest.raises(UserError, match="cannot be read as the configuration"):
        merge_adapter(adapter, tmp_path / "out")


def test_a_base_that_is_missing_is_refused_and_can_be_given(
    policy: ModelOptions, adapter: Path, tmp_path: Path
) -> None:
    file = adapter / "adapter_config.json"
    assert json.loads(file.read_text())["base_model_name_or_path"] == policy.path
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "/nowhere/base"}))
    with pytest.raises(UserError, match=r"base /nowhere/base is not there.*--base"):
        merge_adapter(adapter, tmp_path / "out")
    assert main(["merge", str(adapter), str(tmp_path / "out"), "--base", policy.path]) == 0
    with pytest.raises(UserError, match="exists already"):
        merge_adapter(adapter, tmp_path / "out", policy.path)


@pytest.mark.parametrize(("key", "value"), [("hidden_size", 64), ("num_hidden_layers", 2), ("num_hidden_layers", 3)])
def test_a_base_of_another_shape_is_refused(
    adapter: Path, policy: ModelOptions, tmp_path: Path, key: str, value: int
) -> None:
    other = tmp_path / "other"
    save_policy(load_policy(policy), load_tokenizer(policy.path), other)
    config = json.loads((other / "config.json").read_text()) | {key: value}
    (other / "config.json").write_text(json.dumps(config))
    write_random_policy(ModelOptions(path=str(other), init="random"), tmp_path / "smaller", seed=0)
    with pytest.raises(UserError, match=r"is not for .*smaller"):
        merge_adapter(adapter, tmp_path / "out", str(tmp_path / "smaller"))
    assert not (tmp_path / "out").exists()


def test_an_adapter_as_model_path_is_refused_with_what_to_give(adapter: Path, policy: ModelOptions) -> None:
    with pytest.raises(UserError, match=r"is an adapter, not a model.*align merge"):
        check_model_directory(adapter, policy)
