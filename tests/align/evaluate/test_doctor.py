"""The doctor passes a sound model, and names the cause and the cure of what is wrong with another."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV2Config

from align.evaluate.doctor import (
    Check,
    CheckStatus,
    DoctorError,
    Finding,
    check_demonstrations,
    check_experts,
    check_names,
    check_round_trip,
    check_routing,
    check_softmax_scale,
    check_template,
    examine,
    verdict,
)
from align.model.policy import load_tokenizer
from align.recipe import ModelOptions


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
    assert [check.status for check in checks] == [CheckStatus.OK] * 7
    assert "7 checks, none failed" in verdict(checks, policy.path)


def test_the_softmax_scale_of_v2_lite_is_the_reports() -> None:
    config = DeepseekV2Config(
        num_hidden_layers=1,
        q_lora_rank=None,
        rope_scaling={
            "type": "yarn",
            "factor": 40,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096,
        },
    )
    with torch.device("meta"):
        status, detail = check_softmax_scale(AutoModelForCausalLM.from_config(config))
    assert status is CheckStatus.OK
    assert detail.startswith("0.1147214")


def test_a_softmax_scale_without_yarns_correction(skeleton: Any) -> None:
    for layer in skeleton.model.layers:
        layer.self_attn.scaling = layer.self_attn.qk_head_dim**-0.5
    assert_failed(check_softmax_scale(skeleton), "YaRN", "transformers older than 5.15")


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
    assert_failed(check_names(skeleton, str(tmp_path)), "lack 1", "experts.3.up_proj")
    save_file(tensors | {"model.layers.1.mlp.experts.3.up.weight": lost}, tmp_path / "model.safetensors")
    assert_failed(check_names(skeleton, str(tmp_path)), "have 1 tensors that the architecture does not know")


def test_a_failed_check_ends_in_an_error_that_tells_all() -> None:
    failed = Check("one", CheckStatus.FAILED, "because. Cure: this")
    with pytest.raises(DoctorError, match=r"2 of 3 checks failed\n- one: because\. Cure: this\n- two: because"):
        verdict([failed, Check("fine", CheckStatus.OK, ""), Check("two", CheckStatus.FAILED, failed.detail)], "model")


def test_deepcopy_of_the_configuration_leaves_the_skeleton_alone(skeleton: Any) -> None:
    before = deepcopy(skeleton.config.to_dict())
    check_experts(skeleton)
    assert skeleton.config.to_dict() == before
