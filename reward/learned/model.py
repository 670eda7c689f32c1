"""Learned rewards: a reward model, any sequence classifier of one label that transformers loads, in this process.

DeepSeek-V2's rewards for reasoning, helpfulness and safety are such models (arXiv:2405.04434, section 4.2, eq. 35 and 36).
What a checkpoint's `reward_model.json` says of the scale of its rewards brings several of them to the same scale.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

from reward.chat import encode_example, encode_finished
from reward.registry import register
from reward.rows import messages_of
from reward.types import RewardError, Sample, Score, Verdict
from reward.vocabulary import as_its_file_says

NOTES = "reward_model.json"


@dataclass(frozen=True)
class Scale:
    """From a model's number to a reward: `(number - mean) / std`, cut off at -clip and clip."""

    mean: float = 0.0
    std: float = 1.0
    clip: float | None = None

    def __call__(self, number: float) -> float:
        value = (number - self.mean) / self.std
        return value if self.clip is None else max(-self.clip, min(self.clip, value))


def _ready(path: str, normalise: bool = True, clip: float | None = None) -> None:
    """Raise RewardError for a directory that holds no reward model. One that is not there may still be made."""
    if Path(path).is_dir():
        read_scale(path, normalise=normalise, clip=clip)
        if not (Path(path) / "config.json").is_file():
            raise RewardError(
                f"reward model {path} has no config.json; give a checkpoint, such as the final/ of a run of `align reward-model`"
            )


@register("reward_model", batched=True, ready=_ready)
def reward_model(
    samples: Sequence[Sample],
    *,
    path: str,
    normalise: bool = True,
    clip: float | None = None,
    max_length: int | None = None,
    batch_size: int = 32,
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: str = "auto",
) -> list[Score]:
    """The number that a reward model, a checkpoint at `path`, gives to a completion; it passes above 0.

    The prompt is `sample.metadata["messages"]`, or else `sample.prompt` as the user's message. With `normalise`, the mean
    and the standard deviation of the checkpoint's `reward_model.json` are taken out, so that 0 is an average completion.
    `clip` bounds what comes of it. A conversation of more than `max_length` tokens (None: as many as the model takes) loses
    its oldest ones, those of the prompt first; the detail says so. A truncated completion is read as if it ended there.
    `device` "auto" is a GPU where there is one. The model is loaded once a process.

    Raises RewardError where the checkpoint cannot be used.
    """
    scale = read_scale(path, normalise=normalise, clip=clip)
    model = _load(path, dtype, device)
    return score_conversations(
        samples,
        partial(encode_conversation, path, model.tokenizer),
        bos=model.tokenizer.bos_token_id,
        longest=min(max_length or model.longest, model.longest),
        scale=scale,
        numbers=lambda conversations: model.numbers(conversations, batch_size),
    )


def score_conversations(
    samples: Sequence[Sample],
    encode: Callable[[Sequence[Mapping[str, Any]], str], list[int]],
    *,
    bos: int | None,
    longest: int,
    scale: Scale,
    numbers: Callable[[Sequence[Sequence[int]]], Sequence[float | str]],
) -> list[Score]:
    """A score for each sample from the number that its conversation gets, or INFRA_ERROR with the reason, a text."""
    scores: dict[int, Score] = {}
    conversations: dict[int, list[int]] = {}
    for place, sample in enumerate(samples):
        try:
            conversations[place] = encode(messages_of(sample), sample.completion)
        except (RewardError, KeyError, TypeError) as error:
            scores[place] = Score(math.nan, Verdict.INFRA_ERROR, f"its conversation cannot be read: {error!r}")
    cut = {place: tuple(shortened(ids, longest, bos)) for place, ids in conversations.items()}
    # Each conversation once: the last digit of a number depends on its batch, and equal completions are to be worth the same.
    different = list(dict.fromkeys(cut.values()))
    found = dict(zip(different, numbers(different), strict=True)) if different else {}
    for place, ids in cut.items():
        lost = len(conversations[place]) - len(ids)
        scores[place] = _score(found[ids], scale, f"; its first {lost} tokens were cut off" if lost else "")
    return [scores[place] for place in range(len(samples))]


def _score(number: float | str, scale: Scale, remark: str) -> Score:
    if isinstance(number, str):
        return Score(math.nan, Verdict.INFRA_ERROR, number)
    if not math.isfinite(number):  # which a clip would turn into the most there is
        return Score(math.nan, Verdict.INFRA_ERROR, f"the model says {number}")
    value = scale(number)
    return Score(value, Verdict.PASS if value > 0 else Verdict.WRONG, f"the model says {number:.4g}{remark}")


def read_scale(path: str, *, normalise: bool, clip: float | None) -> Scale:
    """The scale that a checkpoint's `reward_model.json` gives. Raises RewardError where it is asked for and not there."""
    if clip is not None and not clip > 0:
        raise RewardError(f"clip must be above 0, not {clip}")
    if not normalise:
        return Scale(clip=clip)
    file = Path(path) / NOTES
    try:
        notes = json.loads((notes_file(path) or file).read_text(encoding="utf-8"))
        mean, std = float(notes["mean"]), float(notes["std"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        if Path(path).is_absolute() and not Path(path).exists():
            raise RewardError(f"reward model {path} does not exist") from None
        raise RewardError(
            f"{file}: cannot read the mean and std of the model's rewards ({error!r}); `align reward-model` writes them. "
            "For another model set normalise: false"
        ) from None
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
        raise RewardError(
            f"{file}: rewards of mean {mean} and std {std} cannot be normalised: the model tells nothing apart"
        )
    return Scale(mean, std, clip)


def notes_file(path: str) -> Path | None:
    """What `align reward-model` wrote beside a checkpoint, in a directory or on the hub; None beside one that was trained elsewhere."""
    file = Path(path) / NOTES
    return (file if file.exists() else None) if Path(path).is_dir() else _fetched_notes(path)


@lru_cache(maxsize=8)
def _fetched_notes(name: str) -> Path | None:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, NOTES))
    except (OSError, ValueError):  # also where there is no such model, which loading it tells
        return None


@dataclass(frozen=True)
class _Model:
    tokenizer: Any
    network: Any
    longest: int

    def numbers(self, conversations: Sequence[Sequence[int]], batch_size: int) -> list[float]:
        """The number at the end of each conversation, in batches of like length, padded on the right."""
        import torch

        padding, device = self.network.config.pad_token_id, self.network.device
        order = sorted(range(len(conversations)), key=lambda place: len(conversations[place]))
        found: dict[int, float] = {}
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            width = len(conversations[places[-1]])
            # Under a causal mask no real token attends to what is on its right, so padding needs no mask.
            rows = [[*conversations[place], *[padding] * (width - len(conversations[place]))] for place in places]
            with torch.no_grad():
                logits = self.network(input_ids=torch.tensor(rows, device=device), use_cache=False).logits
            found |= dict(zip(places, logits[:, 0].float().tolist(), strict=True))
        return [found[place] for place in range(len(conversations))]


@lru_cache(maxsize=8)
def _load(path: str, dtype: str, device: str) -> _Model:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    if dtype not in ("float32", "bfloat16"):
        raise RewardError(f"reward_model: dtype is float32 or bfloat16, not {dtype!r}")
    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    logging.disable_progress_bar()
    try:
        tokenizer = as_its_file_says(AutoTokenizer.from_pretrained(path, mistral_format=False), path)
        network, report = AutoModelForSequenceClassification.from_pretrained(
            path, dtype=getattr(torch, dtype), output_loading_info=True
        )
        network.to(where).eval().requires_grad_(False)
    except (OSError, ValueError, RuntimeError) as error:
        raise RewardError(f"reward model {path} cannot be loaded: {str(error).strip().splitlines()[0]}") from None
    finally:
        logging.enable_progress_bar()
    missing, labels = report["missing_keys"], network.config.num_labels
    if missing or labels != 1:
        why = f"lacks {min(missing)}" if missing else f"has {labels} labels"
        raise RewardError(f"{path} is no reward model: it needs weights for a classifier of one label, and {why}")
    padding = network.config.pad_token_id
    if padding in (None, encode_conversation(path, tokenizer, [{"role": "user", "content": "?"}], "!")[-1]):
        raise RewardError(
            f"{path}: config.json has pad_token_id {padding}, so that transformers would read the reward before the "
            "token that ends a conversation; set it to another token, such as the BOS"
        )
    choose_kernels(network)
    longest = tokenizer.model_max_length
    return _Model(tokenizer, network, min(getattr(network.config, "max_position_embeddings", longest), longest))


def choose_kernels(model: Any) -> None:
    """Run fused experts as grouped matrix products, and attention whose logits have a cap, as Gemma 2's, by plain ones.

    torch's fused attention knows no such cap, and transformers leaves it out there without a word.
    """
    if has_fused_experts(model):
        model.set_experts_implementation("grouped_mm")
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")


def has_fused_experts(model: Any) -> bool:
    """Whether the experts of a layer are one stacked tensor each for gate-up and down projection."""
    return any(name.endswith("experts.gate_up_proj") for name, _ in model.named_parameters())


def encode_conversation(path: str, tokenizer: Any, messages: Sequence[Mapping[str, Any]], completion: str) -> list[int]:
    """The ids of prompt and completion as the reward model at `path` was trained on them.

    A reward model of `align reward-model` ends with the token that ends an answer. Others are trained and called on the whole rendering: where the
    template writes a line break behind that token, there. Raises RewardError as `reward.chat.encode_example` does.
    """
    if notes_file(path):
        return encode_example(tokenizer, messages, completion)[0]
    return encode_finished(tokenizer, [*messages, {"role": "assistant", "content": completion}])


def shortened(ids: list[int], longest: int, bos: int | None) -> list[int]:
    """The ids, without the oldest of them where there are more than `longest`; the first stays if it is the BOS."""
    if len(ids) <= longest:
        return ids
    head = ids[:1] if ids[0] == bos else []
    return head + ids[len(ids) - longest + len(head) :]
