"""Where an answer ends, a tokenizer that writes more than the model can read, and what a policy's files are like on the disk."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
)

from align.errors import UserError
from align.model.lora import add_adapter, save_adapter
from align.model.policy import (
    attention_kernel,
    attention_sizes,
    dtype_here,
    load_policy,
    load_tokenizer,
    persistent_buffers,
    save_policy,
    stop_token_ids,
)
from align.model.reward_model import load_reward_model
from align.model.sizes import model_sizes, skeleton_of
from align.recipe import LoraOptions, ModelOptions
from reward.chat import encode_prompt
from reward.learned.model import _load as reward_model_of

NANO = Path(__file__).parents[3] / "recipes/nano/policy"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASKED = [{"role": "user", "content": "What is 2 + 2?"}]
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def tokenizer_with(template: str | None = CHATML, special: tuple[str, ...] = (), added: tuple[str, ...] = ()) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(NANO)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.add_tokens(list(added))
    tokenizer.chat_template = template
    return tokenizer


def saved(directory: Path, tokenizer: Any, rows: int | None = None, **config: Any) -> ModelOptions:
    model = LlamaForCausalLM(LlamaConfig(vocab_size=rows or len(tokenizer), **SMALL, **config))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return ModelOptions(path=str(directory))


class TestEnds:
    def test_an_answer_ends_where_the_tokenizer_the_generation_configuration_or_the_template_says(
        self, tmp_path: Path
    ) -> None:
        tokenizer = tokenizer_with(special=("<|im_start|>", "<|im_end|>"))
        model = saved(tmp_path, tokenizer, eos_token_id=5)
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [6, 7]}))
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert stop_token_ids(model, tokenizer) == sorted([tokenizer.eos_token_id, 6, 7, end])

    def test_without_a_generation_configuration_the_models_own_counts(self, tmp_path: Path) -> None:
        tokenizer = tokenizer_with(template=None)
        model = saved(tmp_path, tokenizer, eos_token_id=[5, 6])
        (tmp_path / "generation_config.json").unlink()
        assert stop_token_ids(model, tokenizer) == sorted([tokenizer.eos_token_id, 5, 6])

    def test_a_model_of_text_and_images_says_it_for_its_text(self, tmp_path: Path) -> None:
        text = {"vocab_size": 512, "head_dim": 8, "num_key_value_heads": 1, "eos_token_id": [5, 6], **SMALL}
        vision = {"image_size": 16, "patch_size": 8, **SMALL}
        config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, eos_token_id=[5, 6])
        Gemma3ForConditionalGeneration(config).config.save_pretrained(tmp_path)
        tokenizer = tokenizer_with(template=None)
        assert stop_token_ids(ModelOptions(path=str(tmp_path)), tokenizer) == sorted([tokenizer.eos_token_id, 5, 6])

    def test_white_space_that_is_an_added_token_ends_nothing(self, tmp_path: Path) -> None:
        template = "{% for m in messages %}{{ m.content }}\n\n<|end|>{% endfor %}"
        tokenizer = tokenizer_with(template, special=("<|end|>",), added=("\n\n",))
        stops = stop_token_ids(saved(tmp_path, tokenizer, eos_token_id=None), tokenizer)
        assert stops == sorted({tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")})

    def test_a_checkpoint_names_every_token_that_ends_an_answer(self, tmp_path: Path) -> None:
        tokenizer = tokenizer_with(special=("<|im_start|>", "<|im_end|>"))
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), eos_token_id=5, **SMALL))
        save_policy(model, tokenizer, tmp_path)
        declared = json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"]
        assert declared == stop_token_ids(ModelOptions(path=str(tmp_path)), load_tokenizer(tmp_path))
        assert tokenizer.convert_tokens_to_ids("<|im_end|>") in declared

    @pytest.mark.parametrize(
        ("given", "kept"),
        [
            ({"temperature": 0.9, "top_p": 0.6}, {"temperature": 0.9, "top_p": 0.6, "do_sample": True}),
            ({"top_k": 20, "temperature": 0.6, "do_sample": False}, {"do_sample": False}),
            ({"temperature": 0.7, "do_sample": True}, {"temperature": 0.7, "do_sample": True}),
            ({"output_scores": True, "return_dict_in_generate": False}, {}),
            ({"pad_token_id": -1}, {}),
            ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ],
    )
    def test_a_checkpoint_is_written_with_whatever_generation_config_could_be_read(
        self, given: dict[str, Any], kept: dict[str, Any], tmp_path: Path
    ) -> None:
        tokenizer = tokenizer_with(special=("<|im_start|>", "<|im_end|>"))
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), eos_token_id=5, **SMALL))
        model.generation_config = GenerationConfig(eos_token_id=5, **given)
        save_policy(model, tokenizer, tmp_path)
        written = json.loads((tmp_path / "generation_config.json").read_text())
        assert kept.items() <= written.items()
        assert 5 in written["eos_token_id"]


def test_a_tokenizer_is_that_of_tokenizer_json_whatever_mistral_puts_beside_it(tmp_path: Path) -> None:
    data = Path(pytest.importorskip("mistral_common").__file__).parent / "data"
    tokenizer = tokenizer_with()
    MistralConfig(vocab_size=131072, **SMALL).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tekken.json").symlink_to(data / "tekken_240911.json")
    assert encode_prompt(load_tokenizer(tmp_path), ASKED) == encode_prompt(tokenizer, ASKED)


@pytest.mark.parametrize("beside", ["a config.json", "no config.json, as beside an adapter"])
@pytest.mark.parametrize("named", ["GPT2Tokenizer", "LlamaTokenizerFast"])
def test_a_byte_level_tokenizer_cuts_as_its_file_says_whatever_class_is_named(
    named: str, beside: str, tmp_path: Path
) -> None:
    """transformers 5 builds a tokenizer of its own for such names: of GPT-2's rules, or of SentencePiece's."""
    tokenizer = tokenizer_with()
    tokenizer.save_pretrained(tmp_path)
    name = tmp_path / "tokenizer_config.json"
    name.write_text(json.dumps(json.loads(name.read_text()) | {"tokenizer_class": named}))
    if beside == "a config.json":
        LlamaConfig(vocab_size=len(tokenizer), **SMALL).save_pretrained(tmp_path)

    def ids(one: Any) -> list[int]:
        return one("a  17\n\n1. b", add_special_tokens=False)["input_ids"]

    changed = ids(AutoTokenizer.from_pretrained(tmp_path))
    found = load_tokenizer(tmp_path)
    assert ids(found) == ids(tokenizer) != changed
    assert found.eos_token_id == tokenizer.eos_token_id
    assert encode_prompt(found, ASKED) == encode_prompt(tokenizer, ASKED)
    # Written again, everybody reads it so.
    save_policy(LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SMALL)), found, tmp_path / "final")
    again = AutoTokenizer.from_pretrained(tmp_path / "final")
    assert ids(again) == ids(tokenizer)
    assert again.model_input_names == ["input_ids", "attention_mask"]


@pytest.mark.parametrize("empty", [False, True], ids=["read", "built without its weights"])
def test_attention_has_the_cap_that_the_configuration_gives_its_logits(empty: bool, tmp_path: Path) -> None:
    """Gemma 2 has one, which transformers' default for attention leaves out."""
    torch.manual_seed(0)
    tokenizer = tokenizer_with()
    config = Gemma2Config(
        vocab_size=len(tokenizer), num_key_value_heads=2, head_dim=8, attn_logit_softcapping=0.1, **SMALL
    )
    model = Gemma2ForCausalLM(config)
    for parameter in model.parameters():
        parameter.data *= 30
    save_policy(model, tokenizer, tmp_path)
    ids = torch.arange(3, 12)[None]
    model.set_attn_implementation("eager")
    capped = model.eval()(input_ids=ids).logits
    model.set_attn_implementation("sdpa")
    assert not torch.allclose(model(input_ids=ids).logits, capped)
    options = ModelOptions(path=str(tmp_path))
    loaded, classifier = load_policy(options, empty=empty), load_reward_model(options, tokenizer, empty=empty)
    assert attention_kernel(loaded, torch.device("cpu")) == attention_kernel(classifier, torch.device("cpu")) == "eager"
    assert model_sizes(loaded).caps_attention
    if not empty:
        torch.testing.assert_close(loaded.eval()(input_ids=ids).logits, capped)
        classifier.config.pad_token_id = 2
        save_policy(classifier, tokenizer, tmp_path / "reward")
        scorer = reward_model_of(str(tmp_path / "reward"), "float32", "cpu")
        assert attention_kernel(scorer.network, torch.device("cpu")) == "eager"


def test_code_that_is_not_written_is_not_named(tmp_path: Path) -> None:
    """A model may bring code and be trained without it, by what transformers has of its own."""
    tokenizer = tokenizer_with()
    tokenizer.init_kwargs["auto_map"] = {"AutoTokenizer": ["of.Its", None]}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), **SMALL, auto_map={"AutoModelForCausalLM": "of.Its"})
    )
    save_policy(model, tokenizer, tmp_path)
    for file in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in json.loads((tmp_path / file).read_text())


def test_the_buffers_of_a_checkpoint_are_those_that_persist() -> None:
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 2))
    model[1].register_buffer("bias_of_router", torch.ones(2))
    model[1].register_buffer("made_anew", torch.ones(2), persistent=False)
    parameters = dict(model.named_parameters())
    assert parameters.keys() | dict(persistent_buffers(model)).keys() == model.state_dict().keys()


@pytest.mark.parametrize("same", [True, False])
def test_a_head_of_its_own_is_refused_where_the_config_says_that_it_is_the_embedding(
    same: bool, tmp_path: Path
) -> None:
    tokenizer = tokenizer_with(special=("<|im_start|>", "<|im_end|>"))
    saved(tmp_path, tokenizer, rows=len(tokenizer), tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model.safetensors")
    head = tensors["model.embed_tokens.weight"] + (0.0 if same else 1.0)
    save_file(tensors | {"lm_head.weight": head}, tmp_path / "model.safetensors", {"format": "pt"})
    if same:
        assert load_policy(ModelOptions(path=str(tmp_path)))
    else:
        with pytest.raises(UserError, match=r"has tie_word_embeddings, but lm_head\.weight in the files is another"):
            load_policy(ModelOptions(path=str(tmp_path)))


@pytest.mark.parametrize("known", [True, False])
def test_code_of_a_model_that_wants_another_transformers_is_refused(known: bool, tmp_path: Path) -> None:
    shutil.copytree(NANO, tmp_path, dirs_exist_ok=True)
    own = {"AutoConfig": "modeling_own.Config", "AutoModelForCausalLM": "modeling_own.Model"}
    config = json.loads((tmp_path / "config.json").read_text()) | {"auto_map": own}
    (tmp_path / "config.json").write_text(json.dumps(config | ({} if known else {"model_type": "own"})))
    (tmp_path / "modeling_own.py").write_text("from transformers.utils.import_utils import of_version_4\n")
    cure = (
        "transformers knows 'deepseek_v2' itself: leave model.trust_remote_code out" if known else "take a model that"
    )
    for read in (load_policy, skeleton_of):
        with pytest.raises(UserError, match=rf"the code that .* brings does not run.*of_version_4.*Cure: .*{cure}"):
            read(ModelOptions(path=str(tmp_path), trust_remote_code=True))


class TestVocabulary:
    def test_tokens_that_the_template_writes_and_the_model_lacks_are_refused(self, tmp_path: Path) -> None:
        tokenizer = tokenizer_with(special=("<|im_start|>", "<|im_end|>"))
        saved(tmp_path, tokenizer, rows=len(tokenizer) - 2)
        with pytest.raises(UserError, match=r"2 tokens, '<\|im_end\|>' for one.*resize_token_embeddings"):
            load_tokenizer(tmp_path)

    def test_so_is_a_word_that_was_added(self, tmp_path: Path) -> None:
        tokenizer = tokenizer_with(template=None, added=("<think>",))
        saved(tmp_path, tokenizer, rows=len(tokenizer) - 1)
        with pytest.raises(UserError, match="'<think>' for one"):
            load_tokenizer(tmp_path)

    def test_a_special_token_that_nothing_writes_may_be_beyond_the_embedding(self, tmp_path: Path) -> None:
        tokenizer = tokenizer_with(template=None, special=("<image_soft_token>", "[PAD]"))
        tokenizer.pad_token = "[PAD]"
        saved(tmp_path, tokenizer, rows=len(tokenizer) - 2)
        loaded = load_tokenizer(tmp_path)
        assert loaded.pad_token_id == loaded.eos_token_id, "padding is read by the embedding too"


@pytest.mark.parametrize(
    ("stored", "on_gpu", "expected"),
    [
        ("bfloat16", True, "bfloat16"),
        ("bfloat16", False, "float32"),
        ("float32", True, "float32"),
        (None, True, "float32"),
    ],
)
def test_a_gpu_takes_a_model_in_bfloat16_that_is_stored_so(
    tmp_path: Path, stored: str | None, on_gpu: bool, expected: str
) -> None:
    LlamaConfig(dtype=stored).save_pretrained(tmp_path)
    assert dtype_here(tmp_path, on_gpu=on_gpu) == expected


def test_the_run_says_which_kernel_pytorch_takes_for_the_heads() -> None:
    """On a CPU its flash kernel wants keys and values of one width, as on a GPU."""
    narrow = DeepseekV2Config(
        num_hidden_layers=1, num_attention_heads=2, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=32
    )
    assert attention_sizes(narrow) == (2, 96, 32)
    with torch.device("meta"):
        latent = DeepseekV2ForCausalLM(narrow)
        plain = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, hidden_size=64, num_attention_heads=4))
        latent.config._attn_implementation = plain.config._attn_implementation = "sdpa"
    cpu = torch.device("cpu")
    assert (attention_kernel(latent, cpu), attention_kernel(plain, cpu)) == ("math", "flash_attention")
    plain.config._attn_implementation = "eager"
    assert attention_kernel(plain, cpu) == "eager"


@pytest.fixture(params=[0o022, 0o027], ids=["022", "027"])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_whoever_may_read_the_configuration_may_read_the_weights(
    policy: ModelOptions, umask: int, tmp_path: Path
) -> None:
    model = load_policy(policy)
    save_policy(model, load_tokenizer(policy.path), tmp_path / "final")
    adapted = add_adapter(model, LoraOptions(rank=2), "CAUSAL_LM", policy.path)
    save_adapter(adapted, tmp_path / "final" / "adapter", dict(adapted.named_parameters()))
    modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.rglob("*") if file.is_file()}
    assert {"model.safetensors", "adapter_model.safetensors", "config.json"} <= modes.keys()
    assert set(modes.values()) == {0o666 & ~umask}, modes
