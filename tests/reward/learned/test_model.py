"""A real tiny reward model as a reward: its numbers, their scale, and what is refused."""

import json
import math
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from httpx import Request, Response
from huggingface_hub.errors import RemoteEntryNotFoundError
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    MistralConfig,
    MistralForSequenceClassification,
)

from reward import Mixture, RewardError, RewardTerm, Sample, Verdict
from reward.chat import encode_prompt
from reward.learned import endpoint
from reward.learned.model import Scale, _load, _score, messages_of, notes_file, read_scale, reward_model, shortened

COMPLETIONS = ["4", "It is four.", "I am sorry, but I can't help with that.", "", "4" * 60]


def sample(completion: str, **fields: Any) -> Sample:
    return Sample(
        **{"id": completion, "prompt": "What is 2 + 2?", "completion": completion, "ground_truth": None, **fields}
    )


@lru_cache
def loaded(path: Path) -> tuple[Any, Any]:
    return AutoTokenizer.from_pretrained(path), AutoModelForSequenceClassification.from_pretrained(path).eval()


def by_transformers(path: Path, completion: str, messages: list[dict[str, str]] | None = None) -> float:
    """The number of one conversation, rendered and tokenised as a whole."""
    tokenizer, model = loaded(path)
    messages = messages or [{"role": "user", "content": "What is 2 + 2?"}]
    whole = [*messages, {"role": "assistant", "content": completion}]
    ids = tokenizer.apply_chat_template(whole, return_tensors="pt", return_dict=True)["input_ids"]
    with torch.no_grad():
        return float(model(input_ids=ids).logits)


def changed(checkpoint: Path, tmp_path: Path, **config: Any) -> str:
    """A copy of the checkpoint with other entries in its configuration."""
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    values = json.loads((copy / "config.json").read_text()) | config
    (copy / "config.json").write_text(json.dumps(values))
    return str(copy)


def test_the_prompt_is_the_metadata_s_messages_or_one_message_of_the_user() -> None:
    assert messages_of(sample("A", prompt="Q")) == ({"role": "user", "content": "Q"},)
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    assert messages_of(sample("A", metadata={"messages": messages})) == messages


@pytest.mark.parametrize(
    ("longest", "expected"), [(6, [0, 2, 3, 4, 5, 1]), (9, [0, 2, 3, 4, 5, 1]), (4, [0, 4, 5, 1]), (2, [0, 1])]
)
def test_a_conversation_loses_its_oldest_tokens_but_the_bos(longest: int, expected: list[int]) -> None:
    assert shortened([0, 2, 3, 4, 5, 1], longest, 0) == expected
    assert shortened([0, 2, 3, 4, 5, 1], longest, None) == [0, 2, 3, 4, 5, 1][-longest:]


def test_the_numbers_are_transformers_own_however_they_are_batched(checkpoint: Path) -> None:
    expected = [by_transformers(checkpoint, completion) for completion in COMPLETIONS]
    assert max(expected) - min(expected) > 0.01
    for batch_size in (1, 2, 32):
        scores = reward_model(
            [sample(completion) for completion in COMPLETIONS],
            path=str(checkpoint),
            normalise=False,
            batch_size=batch_size,
        )
        assert [score.value for score in scores] == pytest.approx(expected, abs=1e-5)
        assert [score.verdict for score in scores] == [Verdict.PASS if v > 0 else Verdict.WRONG for v in expected]


def test_a_model_that_was_trained_elsewhere_reads_what_its_template_writes_behind_an_answer(
    checkpoint: Path, tmp_path: Path
) -> None:
    path = Path(changed(checkpoint, tmp_path))
    template = path / "chat_template.jinja"
    template.write_text(template.read_text() + "{% if not add_generation_prompt %}{{ 'x' }}{% endif %}")
    (ours,) = reward_model([sample("4")], path=str(path), normalise=False)
    assert ours.value == pytest.approx(by_transformers(checkpoint, "4"), abs=1e-5)
    (path / "reward_model.json").unlink()
    (theirs,) = reward_model([sample("4")], path=str(path), normalise=False)
    assert theirs.value == pytest.approx(by_transformers(path, "4"), abs=1e-5)
    assert theirs.value != pytest.approx(ours.value, abs=1e-3)


def test_a_model_that_was_published_brings_its_scale(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"me/ours": checkpoint / "reward_model.json"}

    def fetched(name: str, file: str) -> str:
        if name not in there:
            raise RemoteEntryNotFoundError(
                f"{name} has no {file}", response=Response(404, request=Request("GET", "http://hub"))
            )
        return str(there[name])

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetched)
    assert read_scale("me/ours", normalise=True, clip=None) == Scale(0.25, 0.5)
    assert notes_file("them/theirs") is None
    with pytest.raises(RewardError, match=r"them/theirs/reward_model\.json: cannot read the mean and std"):
        reward_model([], path="them/theirs")


def test_the_scale_is_that_of_the_notes_and_can_be_cut_off(checkpoint: Path) -> None:
    (raw,) = reward_model([sample("4")], path=str(checkpoint), normalise=False)
    (score,) = reward_model([sample("4")], path=str(checkpoint))
    assert score.value == pytest.approx((raw.value - 0.25) / 0.5)
    assert score.detail == f"the model says {raw.value:.4g}"
    clip = abs(score.value) / 2
    (clipped,) = reward_model([sample("4")], path=str(checkpoint), clip=clip)
    assert clipped.value == pytest.approx(math.copysign(clip, score.value))
    for strange in (math.nan, math.inf):
        assert _score(strange, Scale(clip=3.0), "").verdict is Verdict.INFRA_ERROR
    assert [Scale(1.0, 2.0, 0.5)(x) for x in (-9.0, 1.0, 1.5, 9.0)] == [-0.5, 0.0, 0.25, 0.5]


def test_the_whole_conversation_of_the_metadata_is_read(checkpoint: Path) -> None:
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "What is 2 + 2?"},
    ]
    (alone,) = reward_model([sample("4")], path=str(checkpoint), normalise=False)
    (score,) = reward_model([sample("4", metadata={"messages": messages})], path=str(checkpoint), normalise=False)
    assert score.value == pytest.approx(by_transformers(checkpoint, "4", messages), abs=1e-5)
    assert score.value != pytest.approx(alone.value, abs=1e-4)


@pytest.mark.parametrize("count", [2, 3, 7])
def test_equal_completions_are_worth_the_same_to_the_last_bit_truncated_or_not(checkpoint: Path, count: int) -> None:
    for text in ("It is", *COMPLETIONS):
        samples = [sample(text, truncated=place % 2 == 1) for place in range(count)]
        assert len({score.value for score in reward_model(samples, path=str(checkpoint))}) == 1


def test_a_conversation_that_is_too_long_loses_the_start_of_its_prompt_and_says_so(checkpoint: Path) -> None:
    prompts = ["Some other words. " * 9 + "What is 2 + 2?", "These differ much. " * 9 + "What is 2 + 2?"]
    samples = [sample("It is four.", id=prompt, prompt=prompt) for prompt in prompts]
    whole = reward_model(samples, path=str(checkpoint))
    short = reward_model(samples, path=str(checkpoint), max_length=20)
    assert whole[0].value != pytest.approx(whole[1].value, abs=1e-6)
    assert short[0].value == pytest.approx(short[1].value, abs=1e-6)
    assert all("; its first " in score.detail and score.detail.endswith("tokens were cut off") for score in short)


def test_a_sample_whose_conversation_cannot_be_read_is_nobodys_fault_but_the_datas(checkpoint: Path) -> None:
    samples = [sample("4"), sample("4", metadata={"messages": [{"content": "no role"}]})]
    good, bad = reward_model(samples, path=str(checkpoint))
    assert good.verdict is not Verdict.INFRA_ERROR
    assert bad.verdict is Verdict.INFRA_ERROR
    assert "its conversation cannot be read" in bad.detail


def test_a_mixture_weighs_two_reward_models(checkpoint: Path) -> None:
    params = {"path": str(checkpoint), "normalise": False}
    mixture = Mixture(
        [
            RewardTerm(name="reward_model", label="helpful", weight=0.7, params=params),
            RewardTerm(name="reward_model", label="safety", weight=0.3, params=params | {"clip": 1e-3}),
        ]
    )
    mixture.make_ready()
    (found,) = mixture.score([sample("It is four.")])
    expected = by_transformers(checkpoint, "It is four.")
    assert found.components.keys() == {"helpful", "safety"}
    assert found.value == pytest.approx(0.7 * expected + 0.3 * math.copysign(1e-3, expected), abs=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"pad_token_id": 1}, "config.json has pad_token_id 1, so that transformers would read the reward before"),
        ({"pad_token_id": None}, "config.json has pad_token_id None"),
        ({"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}, "is no reward model|cannot be loaded"),
        ({"architectures": ["Nothing"], "model_type": "nothing"}, "cannot be loaded"),
    ],
)
def test_a_checkpoint_that_would_give_wrong_numbers_is_refused_before_the_run(
    checkpoint: Path, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    path = changed(checkpoint, tmp_path, **config)
    with pytest.raises(RewardError, match=message):
        Mixture([RewardTerm(name="reward_model", params={"path": path})]).make_ready()


def test_a_policy_is_no_reward_model(checkpoint: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = AutoConfig.from_pretrained(checkpoint)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path)
    with pytest.raises(RewardError, match=r"is no reward model: .* lacks score\.weight"):
        reward_model([], path=str(tmp_path), normalise=False)


def test_without_notes_nothing_is_normalised_silently(checkpoint: Path, tmp_path: Path) -> None:
    path = Path(changed(checkpoint, tmp_path))
    (path / "reward_model.json").unlink()
    with pytest.raises(RewardError, match=r"reward_model\.json: cannot read the mean and std .* normalise: false"):
        reward_model([], path=str(path))
    assert reward_model([], path=str(path), normalise=False) == []
    (path / "reward_model.json").write_text('{"mean": 1, "std": 0}')
    with pytest.raises(RewardError, match=r"std 0\.0 cannot be normalised"):
        reward_model([], path=str(path))
    with pytest.raises(RewardError, match="clip must be above 0"):
        reward_model([], path=str(checkpoint), clip=0.0)


def test_what_files_can_tell_is_told_before_a_run_without_loading_a_model(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ready(path: Path | str, **params: Any) -> None:
        Mixture([RewardTerm(name="reward_model", params={"path": str(path), **params})]).check_ready()

    monkeypatch.setattr("reward.learned.model._load", lambda *_: pytest.fail("a model is loaded"))
    ready(checkpoint)
    ready(tmp_path / "made" / "by an earlier stage")
    ready("someone/reward-model")
    with pytest.raises(RewardError, match=r"cannot read the mean and std"):
        ready(tmp_path)
    with pytest.raises(RewardError, match=r"has no config\.json"):
        ready(tmp_path, normalise=False)


def test_a_tokenizer_is_that_of_tokenizer_json_whatever_mistral_puts_beside_it(
    checkpoint: Path, tmp_path: Path
) -> None:
    data = Path(pytest.importorskip("mistral_common").__file__).parent / "data"
    expected, asked = AutoTokenizer.from_pretrained(checkpoint), [{"role": "user", "content": "What is 2 + 2?"}]
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MistralConfig(
        vocab_size=131072, num_labels=1, pad_token_id=0, bos_token_id=0, num_key_value_heads=2, **small
    )
    MistralForSequenceClassification(config).save_pretrained(tmp_path)
    expected.save_pretrained(tmp_path)
    (tmp_path / "tekken.json").symlink_to(data / "tekken_240911.json")
    ids = encode_prompt(expected, asked)
    for tokenizer in (_load(str(tmp_path), "float32", "cpu").tokenizer, endpoint._tokenizer(str(tmp_path))):
        assert encode_prompt(tokenizer, asked) == ids
    with pytest.raises(RewardError, match=r"is a MistralCommonBackend, which .* mistral_format=False"):
        encode_prompt(AutoTokenizer.from_pretrained(tmp_path), asked)
