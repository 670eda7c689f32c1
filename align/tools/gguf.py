"""A GGUF file as an ordinary Hugging Face directory, and what is lost on the way.

transformers reads the file and takes its quantised weights back to numbers. What it leaves open is done here: refusing a
file that cannot become a policy before anything is written, the pre-tokenizer, the tokens that end an answer, and a
configuration that no longer says "quantised". The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isclose
from pathlib import Path
from typing import Any

from align.errors import UserError
from align.model.policy import (
    DTYPES,
    check_written,
    first_line,
    no_progress_bars,
    probe_logits,
    save_policy,
    tied_names,
    turn_end,
)
from align.recipe import ModelOptions, check_model_directory
from align.run.files import check_writable, whole_directory

MAGIC = b"GGUF"
PLAIN_TYPES = ("F32", "F16", "BF16", "F64")
CONTROL = 3
"""The token type of the tokens that only a template may write."""
NO_CAUSAL_MODELS = {"general", "tokenizer", "t5", "umt5"}
"""What transformers lists beside the architectures that can be policies."""
DISK_MARGIN = 64 * 2**20
"""Bytes for the tokenizer and the rest, beside the weights."""


@dataclass(frozen=True, slots=True)
class Contents:
    """What a GGUF file says of itself: `fields` by key, and the tensors' quantisations with how many have them."""

    file: Path
    fields: dict[str, Any]
    types: Counter[str]
    parameters: int
    vocabulary: int
    """Rows of the embedding."""


def convert_gguf(file: Path, directory: Path, *, dtype: str, chat_template: Path | None = None) -> list[str]:
    """Write the model of a GGUF file to `directory`, in `dtype`: weights, tokenizer, chat template, configurations.

    `chat_template` is a file with the template of a model that has none, or another one. Returns sentences that say what
    was written and what was lost. Raises UserError where the file cannot become a policy; the directory is then as before.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} is there already and not an empty directory; name another one")
    check_writable(directory)
    contents = read_gguf(file)
    template = template_of(contents, chat_template)
    check_room(contents, directory, DTYPES[dtype].itemsize)
    tokenizer = read_tokenizer(contents, template)
    with whole_directory(directory.absolute()) as target:
        stops = write_model(contents, tokenizer, target, dtype)
        check_model_directory(target, ModelOptions(path=str(target)))
    ends = ", ".join(tokenizer.convert_ids_to_tokens(stops))
    return [
        f"{directory}: {contents.parameters:,} parameters in {dtype}, {len(tokenizer):,} tokens; an answer ends with {ends}",
        *losses(contents, dtype, given=chat_template is not None),
    ]


def read_gguf(file: Path) -> Contents:
    """What the file holds. Raises UserError for one that is no GGUF, damaged, or of a kind that cannot be read."""
    from gguf import GGUFReader

    try:
        with file.open("rb") as opened:
            magic = opened.read(len(MAGIC))
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from None
    if magic != MAGIC:
        raise UserError(f"{file} is not a GGUF file: it begins with {magic!r}, not with {MAGIC!r}")
    try:
        reader = GGUFReader(file)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError, UnicodeDecodeError) as error:
        raise UserError(
            f"{file} is cut off or damaged, or of a version that cannot be read ({first_line(error)}); fetch it again and "
            "compare its size with the source's"
        ) from None
    if int(fields.get("split.count", 1)) > 1:
        raise UserError(f"{file} is one of {fields['split.count']} parts; join them first (llama-gguf-split --merge)")
    check_architecture(file, fields)
    check_types(file, reader.tensors)
    embedding = next((t for t in reader.tensors if t.name == "token_embd.weight"), None)
    if embedding is None:
        raise UserError(f"{file} has no tensor token_embd.weight: it is no whole language model (an adapter, perhaps?)")
    check_rope(file, fields, [tensor.name for tensor in reader.tensors])
    return Contents(
        file=file,
        fields=fields,
        types=Counter(t.tensor_type.name for t in reader.tensors),
        parameters=sum(int(t.n_elements) for t in reader.tensors),
        vocabulary=int(embedding.shape[-1]),
    )


def check_architecture(file: Path, fields: dict[str, Any]) -> None:
    """Raise UserError unless transformers can read the architecture, and it is a causal language model's."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    readable = set(GGUF_SUPPORTED_ARCHITECTURES) - NO_CAUSAL_MODELS
    architecture = str(fields.get("general.architecture"))
    # transformers writes qwen2_moe where the file has qwen2moe, and minimax_m2 for minimax-m2.
    if architecture.replace("moe", "_moe").replace("-", "_").replace("__", "_") not in readable:
        raise UserError(
            f"{file}: the architecture {architecture!r} cannot be read from GGUF; take the model's original Hugging Face "
            f"directory instead. Readable: {', '.join(sorted(readable))}"
        )


def check_rope(file: Path, fields: Mapping[str, Any], tensors: Iterable[str]) -> None:
    """Raise UserError for scaled rotary frequencies, of which transformers reads the base alone: the model written would be another one."""
    architecture = str(fields.get("general.architecture"))
    if architecture in ("gpt-oss", "gemma4"):  # whose scaling transformers reads, or knows
        return
    scaled = fields.get(f"{architecture}.rope.scaling.type", "none") != "none"
    if scaled or any(name.startswith(("rope_freqs", "rope_factors")) for name in tensors):
        raise UserError(
            f"{file}: its rotary frequencies are scaled, which transformers does not read from GGUF; take the model's original Hugging Face "
            "directory instead"
        )


def check_rope_base(contents: Contents, config: Any) -> None:
    """Raise UserError where transformers has another rotary base than the file: of StarCoder2, for one, it does not read it."""
    base = contents.fields.get(f"{contents.fields['general.architecture']}.rope.freq_base")
    rope = getattr(config, "rope_parameters", None) or {}
    # Those of several kinds of layers have one for each.
    read = [each["rope_theta"] for each in (rope, *rope.values()) if isinstance(each, dict) and "rope_theta" in each]
    if base is not None and read and not any(isclose(base, each, rel_tol=1e-6) for each in read):
        raise UserError(
            f"{contents.file}: its rotary base is {base:g}, which transformers does not read from GGUF (it takes {read[0]:g}); take the model's "
            "original Hugging Face directory instead"
        )


def check_types(file: Path, tensors: Sequence[Any]) -> None:
    """Raise UserError unless every tensor's quantisation can be taken back to numbers."""
    from gguf import dequantize

    for type_, tensor in {tensor.tensor_type: tensor for tensor in reversed(tensors)}.items():
        try:
            dequantize(tensor.data[:1], type_)
        except NotImplementedError:
            raise UserError(
                f"{file}: {tensor.name} is quantised as {type_.name}, which cannot be taken back to numbers; take a "
                "file with another quantisation, such as Q8_0 or F16"
            ) from None


def template_of(contents: Contents, given: Path | None) -> str:
    """The chat template, from the file `given` or the model's own. Raises UserError where there is none."""
    if given is not None:
        try:
            return given.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--chat-template: cannot read {given}: {error}") from None
    template = contents.fields.get("tokenizer.chat_template")
    if not isinstance(template, str) or not template.strip():
        raise UserError(
            f"{contents.file} has no chat template (base models have none): give one with --chat-template FILE.jinja, for "
            "example the chat_template.jinja of the chat model of the same family"
        )
    return template


def check_room(contents: Contents, directory: Path, bytes_each: int) -> None:
    """Raise UserError where the disk has no room for the weights."""
    needed = contents.parameters * bytes_each + DISK_MARGIN
    place = next(parent for parent in directory.absolute().parents if parent.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"{directory} needs {needed / 2**30:.1f} GiB, and {place} has {free / 2**30:.1f} GiB free; make room, name a "
            "directory elsewhere, or halve it with --dtype bfloat16"
        )


def read_tokenizer(contents: Contents, template: str) -> Any:
    """The file's tokenizer with its chat template. Raises UserError where there is none or it does not fit the model."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokens = contents.fields.get("tokenizer.ggml.tokens")
    if not tokens:
        raise UserError(f"{contents.file} has no tokenizer (tokenizer.ggml.tokens); take a file that was made with one")
    if len(tokens) > contents.vocabulary:
        raise UserError(
            f"{contents.file}: the tokenizer has {len(tokens):,} tokens, the model an embedding for {contents.vocabulary:,}: "
            "they belong to different models"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(contents.file.parent, gguf_file=contents.file.name)
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        kind = contents.fields.get("tokenizer.ggml.model")
        raise UserError(
            f"{contents.file}: transformers cannot read its tokenizer of kind {kind!r}: {first_line(error)}"
        ) from None
    types = contents.fields.get("tokenizer.ggml.token_type") or []
    control = {i: token for i, (token, type_) in enumerate(zip(tokens, types, strict=False)) if type_ == CONTROL}
    ends = [int(contents.fields[key]) for key in ("tokenizer.ggml.bos_token_id", *END_TOKENS) if key in contents.fields]
    special = {index: tokens[index] for index in ends if index < len(tokens)} | control
    for index, token in special.items():
        if tokenizer.convert_tokens_to_ids(token) != index:
            raise UserError(
                f"{contents.file}: transformers does not read {token!r} as the token {index} that it is; take the model's original Hugging Face "
                "directory instead"
            )
    # Only a token that is known as special is kept apart from a user's text.
    tokenizer.add_special_tokens({"additional_special_tokens": [*control.values()]}, replace_extra_special_tokens=False)
    if contents.fields.get("tokenizer.ggml.pre") == "smollm":
        # transformers does not take from the file how a text is cut before it is merged.
        parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.chat_template = template
    context = contents.fields.get(f"{contents.fields['general.architecture']}.context_length")
    if context:
        tokenizer.model_max_length = int(context)
    return tokenizer


END_TOKENS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
READ_RIGHT = ("default", "gpt-2", "llama-bpe", "qwen2", "smollm")


def write_model(contents: Contents, tokenizer: Any, directory: Path, dtype: str) -> list[int]:
    """Write weights, configurations and tokenizer; returns the tokens that end an answer."""
    from transformers import AutoModelForCausalLM

    file = contents.file
    try:
        with no_progress_bars():
            model, report = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, dtype=DTYPES[dtype], output_loading_info=True
            )
    except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError) as error:
        raise UserError(f"{file}: transformers cannot load its weights: {first_line(error)}") from None
    check_rope_base(contents, model.config.get_text_config())
    if lost := sorted(map(str, {*report["missing_keys"], *report["mismatched_keys"]} - tied_names(model))):
        raise UserError(
            f"{file}: {len(lost)} of its tensors do not have the shapes that its metadata give, or are not there, {lost[0]} for one"
        )
    # The weights are plain numbers from here on.
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    model.is_quantized = False
    model.hf_quantizer = None
    model.config.name_or_path = str(contents.fields.get("general.name", file.stem))
    stops = stop_tokens(contents, tokenizer)
    model.generation_config.eos_token_id = stops
    save_policy(model, tokenizer, directory)
    check_written(directory, probe_logits(model))
    return stops


def stop_tokens(contents: Contents, tokenizer: Any) -> list[int]:
    """The file's end tokens, and the one that its template writes after an answer. Raises UserError where there is none."""
    stops = {int(contents.fields[key]) for key in END_TOKENS if key in contents.fields}
    if (end := turn_end(tokenizer)) is not None:
        stops.add(end)
    if not stops:
        raise UserError(
            f"{contents.file} names no end token (tokenizer.ggml.eos_token_id), and its chat template writes none after an "
            "answer: no answer could end. Give a template with --chat-template"
        )
    return sorted(stops)


def losses(contents: Contents, dtype: str, *, given: bool) -> list[str]:
    """What the directory does not have as the model once had it."""
    told = []
    coarse = {name: count for name, count in contents.types.items() if name not in PLAIN_TYPES}
    if coarse:
        kinds = ", ".join(f"{count} as {name}" for name, count in sorted(coarse.items()))
        told.append(
            f"lost: the precision of {sum(coarse.values())} of {contents.types.total()} tensors, which the file holds "
            f"quantised ({kinds}); their {dtype} values are what the quantised ones stand for, not the original weights"
        )
    if dtype == "bfloat16" and set(contents.types) != {"BF16"}:
        told.append("lost: what bfloat16 rounds away of the file's values")
    pre = str(contents.fields.get("tokenizer.ggml.pre", "default"))
    if pre not in READ_RIGHT:
        told.append(
            f"doubtful: the pre-tokenizer {pre!r} is read as its family's usual one; some texts may be cut differently"
        )
    if given:
        told.append("the chat template is the one that was given, not the file's")
    absent = "training state, generation settings other than the end tokens, and whatever else GGUF has no place for"
    return [*told, f"not in the file: {absent}"]
