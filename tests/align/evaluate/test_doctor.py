"""The doctor passes a sound model, and names the cause and the cure of what is wrong with another."""

import json
import math
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV2Config, DeepseekV3Config, GptOssConfig

from align.errors import UserError
from align.evaluate.doctor import (
    CPU_HEADS,
    CPU_LATENTS,
    Check,
    CheckStatus,
    DoctorError,
    Finding,
    check_checkpoint,
    check_demonstrations,
    check_ends,
    check_experts,
    check_round_trip,
    check_routing,
    check_served,
    check_softmax_scale,
    check_template,
    examine,
    positions_of,
    verdict,
    with_room,
)
from align.model.policy import load_tokenizer, save_policy
from align.model.sizes import empty_model, read_config
from align.recipe import ModelOptions
from align.tools.offline import doctor
from rollout import FleetOptions

from ..small_models import save_llama

SMALL_V3 = {
    "vocab_size": 912,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "first_k_dense_replace": 1,
    "num_mtp_layers": 1,
}


@pytest.fixture
def skeleton(policy: ModelOptions) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(policy.path))


def assert_failed(finding: Finding, *words: str) -> None:
    status, detail = finding
    assert status is CheckStatus.FAILED
    assert all(word in detail for word in (*words, "Cure"))


def test_the_nano_policy_is_fit(policy: ModelOptions) -> None:
    checks = examine(policy, load_tokenizer(policy.path))
    assert [check.status for check in checks] == [CheckStatus.OK] * 8
    assert "8 checks, none failed" in verdict(checks, policy.path)


def test_the_softmax_scale_of_v2_lite_is_the_reports() -> None:
    status, detail = check_softmax_scale(empty_model(read_config("deepseek-ai/DeepSeek-V2-Lite")))
    assert status is CheckStatus.OK
    assert detail.startswith("0.1147214")


def test_a_softmax_scale_without_yarns_correction(skeleton: Any) -> None:
    for layer in skeleton.model.layers:
        layer.self_attn.scaling = layer.self_attn.qk_head_dim**-0.5
    assert_failed(check_softmax_scale(skeleton), "YaRN", "transformers older than 5.15")


@pytest.mark.parametrize("local", [True, False])
def test_names_that_the_sampler_would_not_know_are_found_with_and_without_files(local: bool, tmp_path: Path) -> None:
    small = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "vocab_size": 100}
    model = AutoModelForCausalLM.from_config(GptOssConfig(num_local_experts=4, **small))
    if local:
        model.save_pretrained(tmp_path)
    found = check_checkpoint(model.to("meta"), tmp_path if local else None)
    assert_failed(found, "call model.layers.0.mlp.experts.0.down_proj.weight otherwise")


def test_experts_that_disagree(skeleton: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import moe

    right = moe.ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    monkeypatch.setitem(moe.ALL_EXPERTS_FUNCTIONS._global_mapping, "grouped_mm", lambda *a, **k: 1.1 * right(*a, **k))
    assert_failed(check_experts(skeleton), "eager and grouped_mm differ")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"topk_method": "greedy", "n_group": 4, "topk_group": 2}, "vLLM takes experts from the best groups alone"),
        ({"norm_topk_prob": True}, "vLLM divides the weights"),
    ],
)
def test_routing_that_vllm_computes_otherwise_than_transformers(changed: dict[str, Any], said: str) -> None:
    assert_failed(check_routing(DeepseekV2Config(**changed)), said)


def test_the_routing_of_deepseek_v2_is_fit() -> None:
    published = {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3, "routed_scaling_factor": 16.0}
    assert check_routing(DeepseekV2Config(**published, norm_topk_prob=False))[0] is CheckStatus.OK


class Tokenizer:
    """A tokenizer with something wrong."""

    def __init__(self, tokenizer: Any, **changed: Any):
        self._tokenizer, self._changed = tokenizer, changed

    def __getattr__(self, name: str) -> Any:
        return self._changed.get(name) or getattr(self._tokenizer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._tokenizer(*args, **{k: v for k, v in kwargs.items() if k not in self._changed.get("ignores", ())})


def test_a_tokenizer_that_loses_white_space(policy: ModelOptions) -> None:
    tokenizer = load_tokenizer(policy.path)
    lossy = Tokenizer(tokenizer, decode=lambda ids, **_: " ".join(tokenizer.decode(ids).split()))
    assert_failed(check_round_trip(lossy), "comes back as", "PreTrainedTokenizerFast")


def test_a_tokenizer_that_lets_text_become_special_tokens(policy: ModelOptions) -> None:
    tokenizer = load_tokenizer(policy.path)
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("b", normalized=True, special=True)]})
    tokenizer.eos_token = "b"
    assert_failed(check_template(tokenizer), "in a text, where it must stay text")


@pytest.mark.parametrize(
    ("opening", "answer", "status", "words"),
    [
        ("", "{{ m.content }}", CheckStatus.OK, "with a thought and without"),
        (
            "<think>\n",
            "{{ m.content }}",
            CheckStatus.LIMITED,
            "no SFT and no reward model on answers without a thought",
        ),
        ("<think>\n\n</think>", "<think>\n\n</think>{{ m.content }}", CheckStatus.LIMITED, "on answers with a thought"),
        (
            "<think>\n",
            "{{ m.content.split('</think>')[-1] }}",
            CheckStatus.LIMITED,
            "no SFT and no reward model: the chat",
        ),
    ],
)
def test_the_doctor_says_first_what_the_template_refuses_as_a_demonstration(
    policy: ModelOptions, opening: str, answer: str, status: CheckStatus, words: str
) -> None:
    tokenizer = load_tokenizer(policy.path)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }}{% else %}A: "
        f"{answer}{{{{ eos_token }}}}{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}}A: {opening}{{% endif %}}"
    )
    check = Check("demonstrations", *check_demonstrations(tokenizer))
    assert (check.status, words in check.detail) == (status, True)
    assert (words in verdict([check], "model")) == (status is CheckStatus.LIMITED)


def test_the_doctor_says_that_a_template_takes_no_system_messages(policy: ModelOptions) -> None:
    tokenizer = load_tokenizer(policy.path)
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('none here') }}{% endif %}{{ messages[0].content }}"
    )
    status, detail = check_template(tokenizer)
    assert status is CheckStatus.OK
    assert "system messages cannot be used" in detail
    assert "none here" in detail


def test_files_that_lack_a_tensor(skeleton: Any, policy: ModelOptions, tmp_path: Path) -> None:
    tensors = load_file(Path(policy.path) / "model.safetensors")
    lost = tensors.pop("model.layers.1.mlp.experts.3.up_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    assert_failed(check_checkpoint(skeleton, tmp_path), "lack 1", "experts.3.up_proj")
    save_file(tensors | {"model.layers.1.mlp.experts.3.up.weight": lost}, tmp_path / "model.safetensors")
    assert_failed(check_checkpoint(skeleton, tmp_path), "have 1 tensors that the architecture does not know")


def test_tensors_that_are_not_trained_are_told(policy: ModelOptions, tmp_path: Path) -> None:
    """Layers that predict tokens further ahead, which transformers does not read; the configuration that is saved has none."""
    config = DeepseekV3Config(**SMALL_V3)
    model = AutoModelForCausalLM.from_config(config)
    save_policy(model, load_tokenizer(policy.path), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["num_nextn_predict_layers"] == 0
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"model.layers.61.eh_proj.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    status, detail = check_checkpoint(model.to("meta"), tmp_path)
    assert status is CheckStatus.OK
    assert "1 more, model.layers.61.eh_proj.weight for one" in detail
    assert "not in what is saved" in detail


def test_weights_that_are_there_a_second_time_in_another_layout_are_not_looked_at(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "model")
    save_file({"layers.0.wq.weight": torch.zeros(2, 2)}, tmp_path / "model" / "consolidated.safetensors")
    examined(tmp_path / "model")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound model, its weights in two files."""
    directory = tmp_path_factory.mktemp("llama")
    save_llama(directory, intermediate_size=64, max_shard_size="1MB")
    return directory


def examined(directory: Path) -> str:
    """What `align check` and the doctor say of a model before engines start."""
    model = ModelOptions(path=str(directory))
    read_config(model.path)
    checks = examine(model, load_tokenizer(model.path), rollout=FleetOptions(max_length=128))
    return verdict(checks, model.path)


def test_a_sound_model_of_several_files(llama: Path) -> None:
    assert "9 checks, none failed" in examined(llama)


def values(file: str, **changed: Any) -> Callable[[Path], object]:
    """Changes values of a JSON file; None takes one out."""

    def change(directory: Path) -> None:
        before = json.loads((directory / file).read_text()) | changed
        (directory / file).write_text(json.dumps({k: v for k, v in before.items() if v is not None}))

    return change


def text(file: str, content: str) -> Callable[[Path], object]:
    return lambda directory: (directory / file).write_text(content)


def without_end(directory: Path) -> None:
    for file in ("config.json", "generation_config.json", "tokenizer_config.json"):
        values(file, eos_token_id=None, eos_token=None)(directory)


def narrow_heads(directory: Path) -> None:
    """Weights and configuration agree on heads of 16."""
    config = AutoConfig.from_pretrained(directory, head_dim=16)
    for file in directory.glob("model*"):
        file.unlink()
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)


SHARD = "model-00001-of-00002.safetensors"
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": 64,
    "factor": 2.0,
    "short_factor": [1.0] * 16,
    "long_factor": [2.0] * 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "original_max_position_embeddings": 64, "factor": 4.0}
ENDS = "{% for m in messages %}{{ m.role }}: {{ m.content }}END{% endfor %}"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (text("config.json", '{"model_type": "ll'), "config.json cannot be read as a model's configuration: Unterminated"),
        (values("config.json", model_type="foo"), "can make no causal language model of .*model type `foo`"),
        (values("config.json", model_type="t5"), "can make no causal language model of .*T5Config"),
        (values("config.json", num_attention_heads=3), "config.json is not valid: .* not a multiple of the number of attention heads"),
        (values("config.json", architectures=None), r'names no architectures.*"architectures": \["LlamaForCausalLM"\]'),
        (values("config.json", vocab_size=64), "beyond the 64 rows of the model's embedding"),
        (values("config.json", vocab_size=1024), r"embed_tokens.weight is \[912, 128\] in the files and \[1024, 128\] by config.json"),
        (values("config.json", quantization_config={"quant_method": "gptq"}), r"quantised \(gptq\) and cannot be trained"),
        (values("config.json", max_position_embeddings=64), "max_length is 128, and the model has 64 positions"),
        (values("config.json", max_position_embeddings=64, rope_parameters=YARN), "has 64 positions. Cure: lower it to 64, or set max_position_embeddings in config.json to 256"),
        (values("config.json", rope_parameters=LONG_ROPE), "max_length is 128, and the model's LongRoPE has other factors for more than 64"),
        (narrow_heads, "a head is 16 wide, and vLLM takes 32, 64"),
        (text("tokenizer.json", "{"), "has no tokenizer that transformers can load"),
        (lambda d: (d / "chat_template.jinja").unlink(), "has no chat template"),
        (text("chat_template.jinja", "{% for m in %}"), "chat template: .* refuses messages of user: Expected an expression"),
        (text("chat_template.jinja", ENDS.replace("END", "<|end|>")), "ends an answer with <|end|>, which is no token".replace("|", r"\|")),
        (text("generation_config.json", '{"eos'), "generation_config.json cannot be read"),
        (values("generation_config.json", eos_token_id=5000), "end of sequence 5000 is beyond the 912 rows"),
        (values("generation_config.json", eos_token_id="</s>"), "is '</s>', where the number of a token must stand"),
        (without_end, "declares no end-of-sequence token"),
        (lambda d: (d / SHARD).unlink(), f"lacks 1 of 2 files with weights, {SHARD}"),
        (lambda d: (d / SHARD).write_bytes((d / SHARD).read_bytes()[:-9]), f"{SHARD} is cut off or damaged"),
        (text(SHARD, "version https://git-lfs.github.com/spec/v1\noid"), f"{SHARD} is a pointer of Git LFS"),
        (text("model.safetensors.index.json", "{"), "index.json is damaged"),
    ],
)  # fmt: skip
def test_what_would_end_a_run_later_is_said_first(
    damage: Callable[[Path], object], said: str, llama: Path, tmp_path: Path
) -> None:
    shutil.copytree(llama, tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(UserError, match=said) as refused:
        examined(tmp_path / "model")
    assert "\n" not in str(refused.value).strip()


def test_an_architecture_that_vllm_lacks_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align.evaluate.doctor.is_known_to_vllm", lambda skeleton: False)
    with pytest.raises(UserError, match=r"vLLM \d[\d.]* has no LlamaForCausalLM"):
        examined(llama)


def test_what_this_machine_does_not_take_the_nodes_of_a_cluster_may(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(llama, tmp_path / "model")
    narrow_heads(tmp_path / "model")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    examined(tmp_path / "model")


def test_of_layers_that_differ_the_widest_heads_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64}
    skeleton = empty_model(
        {"model_type": "gemma4_text", "num_hidden_layers": 6, "head_dim": 128, "global_head_dim": 256, **small}
    )
    skeleton.config.architectures = ["Gemma4ForCausalLM"]
    monkeypatch.setattr("align.evaluate.doctor.is_known_to_vllm", lambda _: True)
    status, detail = check_served(skeleton, "float32", FleetOptions(workers=1, max_length=64))
    assert (status, detail) == (CheckStatus.OK, "takes Gemma4ForCausalLM with heads of 256")


@pytest.mark.parametrize(
    ("rope", "expected"),
    [("default", 100), ("linear", 400), ("dynamic", 400), ("yarn", 100), ("llama3", 100), ("longrope", 100)],
)
def test_a_model_has_the_positions_that_vllm_takes(rope: str, expected: int) -> None:
    parameters = {"rope_type": rope, "factor": 1.0 if rope == "default" else 4.0}
    config = SimpleNamespace(model_type="llama", max_position_embeddings=100, rope_parameters=parameters)
    assert positions_of(config) == expected
    config.rope_parameters = {"sliding_attention": {"rope_type": "default"}, "full_attention": parameters}
    assert positions_of(config) == expected
    config.rope_parameters, config.max_position_embeddings = None, None
    assert positions_of(config) == math.inf


@pytest.mark.parametrize("gpus", [1.0, 0.4])
def test_a_cache_without_room_for_one_sequence_is_refused_and_made_larger_where_nobody_chose_it(
    skeleton: Any, gpus: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("align.evaluate.doctor.is_known_to_vllm", lambda _: True)
    options = FleetOptions(workers=1, max_length=400, kv_cache_gb=0.001, gpus=gpus)
    status, detail = check_served(skeleton, "float32", options)
    assert status is CheckStatus.FAILED
    assert detail.endswith(
        "one sequence of rollout.max_length=400 needs 0.00 GiB: raise rollout.kv_cache_gb, or lower rollout.max_length"
    )
    enough = with_room(skeleton.config, "float32", options)
    assert enough.kv_cache_gb == (400 + 256) * 4 * 576 * 4 / 2**30
    assert check_served(skeleton, "float32", enough)[0] is CheckStatus.OK
    assert with_room(skeleton.config, "float32", FleetOptions(kv_cache_gb=2)).kv_cache_gb == 2


@pytest.mark.slow
def test_the_sizes_of_heads_are_those_of_vllms_kernels_for_cpus() -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
    from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend

    assert list(CPU_HEADS) == CPUAttentionBackend.get_supported_head_sizes()
    assert list(CPU_LATENTS) == CPUMLABackend.get_supported_head_sizes()


def test_the_end_of_a_turn_may_be_another_than_the_declared_end_of_sequence(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "model")
    values("generation_config.json", eos_token_id=5)(tmp_path / "model")
    model = ModelOptions(path=str(tmp_path / "model"))
    tokenizer = load_tokenizer(model.path)
    status, detail = check_ends(model, tokenizer, 912)
    stops = " and ".join(tokenizer.convert_ids_to_tokens(sorted({5, tokenizer.eos_token_id})))
    assert (status, detail) == (CheckStatus.OK, f"an answer ends with {tokenizer.eos_token}; sampling stops at {stops}")


def test_no_engine_starts_for_a_model_that_cannot_be_trained(llama: Path, tmp_path: Path, capsys: Any) -> None:
    shutil.copytree(llama, tmp_path / "model")
    (tmp_path / "model" / SHARD).unlink()
    with patch("align.tools.offline.running_fleet", side_effect=AssertionError), pytest.raises(DoctorError):
        doctor(ModelOptions(path=str(tmp_path / "model")), FleetOptions(max_length=128))
    assert "FAILED   checkpoint: " in capsys.readouterr().out


def test_a_failed_check_ends_in_an_error_that_tells_all() -> None:
    failed = Check("one", CheckStatus.FAILED, "because. Cure: this")
    with pytest.raises(DoctorError, match=r"2 of 3 checks failed\n- one: because\. Cure: this\n- two: because"):
        verdict([failed, Check("fine", CheckStatus.OK, ""), Check("two", CheckStatus.FAILED, failed.detail)], "model")


def test_deepcopy_of_the_configuration_leaves_the_skeleton_alone(skeleton: Any) -> None:
    before = deepcopy(skeleton.config.to_dict())
    check_experts(skeleton)
    assert skeleton.config.to_dict() == before
