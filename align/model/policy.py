"""Building and loading the policy as a transformers model."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from align.errors import UserError, reward_errors
from align.model.names import add_older_forms
from align.recipe import ModelOptions
from reward.chat import end_of_answer
from reward.learned.model import choose_kernels
from reward.vocabulary import as_its_file_says

logger = logging.getLogger(__name__)

OF_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")
"""Keys of a generation config that greedy decoding does not read."""
AHEAD = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "num_mtp_modules")
"""Keys of a configuration for how many tokens further ahead layers predict."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

if not torch.cuda.is_available():
    # transformers imports DeepSpeed where it is installed, which otherwise warns that it looked for a GPU.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model directory or hub name.

    Raises UserError when there is none, and when it writes tokens that the model beside it has no embedding for.
    """
    from transformers import AutoTokenizer

    config = find_config(path, trust_remote_code=trust_remote_code)
    try:
        with code_of(path, trusted=trust_remote_code):
            # Otherwise a tekken.json, which Mistral's models have beside tokenizer.json, makes it a class without chat templates.
            tokenizer = AutoTokenizer.from_pretrained(
                str(path), trust_remote_code=trust_remote_code, mistral_format=False
            )
        tokenizer = as_its_file_says(tokenizer, path)
    except (OSError, ValueError) as error:
        if len(Path(path).parts) > 2 and not Path(path).exists():
            raise UserError(f"model.path: {path} does not exist") from None
        raise UserError(
            f"model.path: {path} has no tokenizer that transformers can load: {first_line(error)}"
        ) from None
    rows = config and getattr(config.get_text_config(), "vocab_size", None)
    if rows:
        check_vocabulary(tokenizer, rows, path)
        if (tokenizer.pad_token_id or 0) >= rows:
            tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextmanager
def code_of(path: str | Path, *, trusted: bool) -> Iterator[None]:
    """A block that runs the code which a model brings, where it is `trusted`. Raises UserError for names and packages that it does not find here."""
    try:
        yield
    except (AttributeError, ImportError) as error:
        if not trusted:
            raise
        config = find_config(path)
        known = f"transformers knows {config.model_type!r} itself: leave model.trust_remote_code out" if config else ""
        raise UserError(
            f"model.path: the code that {path} brings does not run with transformers {version('transformers')}: {first_line(error)}. "
            f"Cure: {known or 'install what it names, or take a model that transformers knows'}"
        ) from None


def find_config(path: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The configuration of a model directory or hub name; None where there is none, as beside an adapter.

    Raises UserError for sizes that contradict each other, and as `code_of` does.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        with code_of(path, trusted=trust_remote_code):
            return AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    except (OSError, ValueError):
        return None
    except StrictDataclassError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"model.path: {path}/config.json is not valid: {reason}") from None


def dtype_here(
    path: str | Path, *, on_gpu: bool | None = None, trust_remote_code: bool = False
) -> Literal["float32", "bfloat16"]:
    """bfloat16 on a GPU (this machine's, unless told) for a model that is stored so by its configuration, else float32."""
    on_gpu = torch.cuda.is_available() if on_gpu is None else on_gpu
    stored = getattr(find_config(path, trust_remote_code=trust_remote_code), "dtype", None)
    return "bfloat16" if on_gpu and stored in (torch.bfloat16, "bfloat16") else "float32"


def check_vocabulary(tokenizer: Any, rows: int, path: str | Path) -> None:
    """Raise UserError for tokens that a conversation can hold and for which the embedding, of `rows` rows, has none.

    Special tokens that neither the chat template nor an end of sequence writes, such as Gemma 3's for images, may be beyond it.
    """
    template = str(tokenizer.chat_template or "")
    added, ends = tokenizer.added_tokens_decoder, {tokenizer.bos_token_id, tokenizer.eos_token_id}
    beyond = [
        token
        for token, id_ in tokenizer.get_vocab().items()
        if id_ >= rows and (id_ in ends or token in template or id_ not in added or not added[id_].special)
    ]
    if beyond:
        raise UserError(
            f"model.path: the tokenizer of {path} has {len(beyond)} tokens, {min(beyond)!r} for one, that are beyond the {rows} rows of the "
            "model's embedding. Cause: tokens were added, and the model was not resized. Cure: "
            "model.resize_token_embeddings(len(tokenizer)) and save_pretrained, or a tokenizer without them"
        )


def load_policy(options: ModelOptions, dtype: torch.dtype | None = None, *, empty: bool = False) -> Any:
    """The pretrained policy, in `dtype` or the recipe's; with `empty`, as `without_content` makes it.

    Raises UserError when transformers cannot load it, or loads a head of its own where `config.json` says that it is the embedding.
    """
    from transformers import AutoModelForCausalLM

    read = partial(without_content, AutoModelForCausalLM) if empty else AutoModelForCausalLM.from_pretrained
    try:
        with code_of(options.path, trusted=options.trust_remote_code):
            model = read(
                options.path, dtype=dtype or DTYPES[options.dtype], trust_remote_code=options.trust_remote_code
            )
    except (OSError, ValueError) as error:
        raise UserError(f"model.path: transformers cannot load {options.path}: {first_line(error)}") from None
    parameters = {name for name, _ in model.named_parameters()}
    if own := sorted(tied_names(model) & parameters):
        raise UserError(
            f"model.path: config.json of {options.path} has tie_word_embeddings, but {own[0]} in the files is another than the embedding: saved and "
            "loaded again it would be lost. Cure: tie_word_embeddings: false in config.json"
        )
    choose_kernels(model)
    return model


def tied_names(model: Any) -> set[str]:
    """The parameters that are others under a second name, and which checkpoints leave out: by its configuration."""
    # Configuration classes of others need not have the key.
    tied = getattr(model.config, "tie_word_embeddings", False)
    return set(getattr(model, "_tied_weights_keys", None) or ()) if tied else set()


def without_content(kind: Any, path: str, *, dtype: torch.dtype, trust_remote_code: bool, **changes: Any) -> Any:
    """What `kind.from_pretrained`, of a transformers class, returns for a checkpoint, whose weights are not read.

    Buffers have their values. Parameters have memory that nothing was written to: it takes up none until something is.
    """
    from transformers import AutoConfig
    from transformers.initialization import no_init_weights

    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **changes)
    with no_init_weights():
        model = kind.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    model.tie_weights()
    return model.eval()


def write_random_policy(options: ModelOptions, directory: Path, seed: int) -> None:
    """Draw the weights of a configuration from `seed` and write the policy to `directory`, tokenizer included."""
    from transformers import AutoConfig, AutoModelForCausalLM

    trusted = {"trust_remote_code": options.trust_remote_code}
    config = AutoConfig.from_pretrained(options.path, **trusted)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[options.dtype], **trusted)
    save_policy(model, load_tokenizer(options.path, **trusted), directory)


def save_policy(model: Any, tokenizer: Any, directory: Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
    """Write a Hugging Face checkpoint: safetensors under the architecture's checkpoint names, and the tokenizer.

    Versions 4 and 5 of transformers read it.
    Its `generation_config.json` names all tokens that end a completion, so that whoever loads it stops where training did.
    """
    if not model.is_remote_code():
        forget_what_is_not_written(model.config)
    if tokenizer._auto_class is None:
        tokenizer.init_kwargs.pop("auto_map", None)
    if (generation := getattr(model, "generation_config", None)) is not None:
        ends = ends_of(generation, tokenizer)
        generation.eos_token_id = ends[0] if len(ends) == 1 else ends
        model.generation_config = writable(generation)
    with no_progress_bars():
        model.save_pretrained(directory, state_dict=state_dict)
    tokenizer.save_pretrained(directory)
    add_older_forms(directory, model.config, tokenizer)
    let_weights_be_read_like(directory / "config.json")


def forget_what_is_not_written(config: Any) -> None:
    """Take out of a configuration what transformers' own classes neither read nor write: code that the model brought, and layers that predict tokens
    further ahead."""
    for part in (config, config.get_text_config()):
        vars(part).pop("auto_map", None)
        for key in AHEAD:
            if getattr(part, key, None):
                setattr(part, key, 0)


def writable(generation: Any) -> Any:
    """A generation config that transformers writes: it reads some that it then refuses to write, such as a temperature without `do_sample`.

    Where `do_sample` is false it stays so, and what it leaves without effect goes. What still cannot be written is left out but for the tokens that
    begin, end and fill up, and said.
    """
    from transformers import GenerationConfig

    try:
        generation.validate(strict=True)
    except ValueError:
        if generation.do_sample is False:
            for name in OF_SAMPLING:
                setattr(generation, name, None)
        else:
            generation.do_sample = True
        try:
            generation.validate(strict=True)
        except ValueError as error:
            logger.warning("generation_config.json is written with its special tokens alone: %s", first_line(error))
            names = ("bos_token_id", "eos_token_id", "pad_token_id")
            ids = {name: found for name in names if (found := getattr(generation, name)) not in (None, -1)}
            return GenerationConfig(**ids)
    return generation


def persistent_buffers(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The buffers that a checkpoint of the model has beside its parameters, such as the bias of a router, by name."""
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name.removeprefix(f"{prefix}.") not in module._non_persistent_buffers_set:
                yield name, buffer.detach()


def let_weights_be_read_like(file: Path) -> None:
    """Give the safetensors files beside `file` its mode, which the umask chose: the library itself makes them 0600."""
    for weights in file.parent.glob("*.safetensors"):
        weights.chmod(file.stat().st_mode & 0o777)


def probe_logits(model: Any) -> torch.Tensor:
    """What a policy or a reward model computes for a few ids from all over its vocabulary, in float32 on the CPU."""
    rows = model.get_input_embeddings().weight.shape[0]
    ids = torch.linspace(0, rows - 1, 32).long()[None].to(model.device)
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=ids, use_cache=False).logits
    return logits.float().cpu()


def check_written(directory: Path, expected: torch.Tensor) -> None:
    """Raise UserError unless the checkpoint in `directory` opens as it stands and computes the `probe_logits` that are expected.

    They may differ by 0.1 % of the largest in float32; in a coarser dtype, where merged weights are rounded, by 5 %.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    architectures = find_config(directory).architectures or [""]
    classifies = architectures[0].endswith("ForSequenceClassification")
    kind = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
    try:
        load_tokenizer(directory)
        with no_progress_bars():
            model, report = kind.from_pretrained(directory, dtype="auto", output_loading_info=True)
        found = probe_logits(model)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"what was written cannot be loaded again, so it was removed: {first_line(error)}") from None
    lost = sorted(map(str, {*report["missing_keys"], *report["mismatched_keys"], *report["unexpected_keys"]}))
    tolerance = 1e-3 if model.dtype == torch.float32 else 5e-2
    apart = float((found - expected).abs().max()) if found.shape == expected.shape else float("inf")
    if lost or not apart <= tolerance * float(expected.abs().max()):
        reason = f"{lost[0]} is not what the model needs" if lost else f"its logits are off by {apart:.2g}"
        raise UserError(f"what was written is another model than was to be written, so it was removed: {reason}")


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep transformers' bars off the terminal, where the run's own display is."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def attention_sizes(config: Any) -> tuple[int, int, int]:
    """The heads of a model, and the widths of a head's keys and of its values, which differ in latent attention; of layers that differ, the widest."""
    config = config.get_text_config()
    heads = config.num_attention_heads
    if getattr(config, "kv_lora_rank", None):
        return heads, config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    width = max(map(head_width, config.per_layer_config))
    return heads, width, width


def head_width(layer: Any) -> int:
    """The width of a head of attention that is not latent, by the configuration of its layer: those of Gemma 4 differ."""
    return getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads


def attention_kernel(model: Any, device: torch.device) -> str:
    """What computes the causal attention of a model's heads in training: of transformers' "sdpa" the kernel that torch takes there."""
    if model.config._attn_implementation != "sdpa":
        return str(model.config._attn_implementation)
    heads, keys, values = attention_sizes(model.config)
    q, k, v = (
        torch.empty(1, heads, 256, width, dtype=model.dtype, device=device, requires_grad=True)
        for width in (keys, keys, values)
    )
    return torch.nn.attention.SDPBackend(torch._fused_sdp_choice(q, k, v, None, 0.0, True)).name.lower()


def stop_token_ids(model: ModelOptions, tokenizer: Any) -> list[int]:
    """The tokens that end a completion, in ascending order. Raises UserError where a model has none, or names something else.

    They are the tokenizer's end of sequence, those that the model's `generation_config.json` names (where it has no such file, its
    `config.json`), and the one with which the chat template ends an answer.
    """
    from transformers import GenerationConfig

    try:
        generation = GenerationConfig.from_pretrained(model.path)
    except OSError as error:
        if (file := Path(model.path) / "generation_config.json").is_file():
            raise UserError(
                f"model.path: {file} cannot be read ({first_line(error)}). Cure: copy it again, or remove it"
            ) from None
        config = find_config(model.path, trust_remote_code=model.trust_remote_code)
        generation = GenerationConfig() if config is None else GenerationConfig.from_model_config(config)
    declared = generation.eos_token_id
    if any(type(end) is not int for end in (declared if isinstance(declared, list) else [declared or 0])):
        raise UserError(
            f"model.path: eos_token_id of {model.path} is {declared!r}, where the number of a token must stand, or a list of them"
        )
    stops = ends_of(generation, tokenizer)
    if not stops:
        raise UserError(
            f"model.path: {model.path} declares no end-of-sequence token, so no completion could end. Cure: set eos_token_id in its "
            "generation_config.json"
        )
    return stops


def ends_of(generation: Any, tokenizer: Any) -> list[int]:
    """The tokens with which a generation configuration, a tokenizer and its chat template end an answer."""
    declared = generation.eos_token_id
    ends = {tokenizer.eos_token_id, turn_end(tokenizer), *(declared if isinstance(declared, list) else [declared])}
    return sorted(ends - {None})


@reward_errors()
def turn_end(tokenizer: Any) -> int | None:
    """`reward.chat.end_of_answer`. Raises UserError where the chat template cannot be rendered."""
    return end_of_answer(tokenizer)


def first_line(error: Exception) -> str:
    """The first line of an exception's message."""
    return str(error).strip().split("\n")[0]
