"""Building and loading reward models: a policy whose language model head is replaced by one that gives a single number."""

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from string import Formatter
from typing import Any

import torch

from align.errors import UserError
from align.model.policy import DTYPES, code_of, first_line, turn_end, without_content
from align.recipe import ModelOptions
from reward.learned.model import choose_kernels

HEAD = "score.weight"
USAGE = """# A reward model

The number at the last token of a conversation says how good its last answer is. That token is {end!r}; a chat template that
writes anything behind it, if only a line break, would have the number read from a place where the model has not learned to give one.

```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

path = {path!r}
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForSequenceClassification.from_pretrained(path)


def reward(messages):
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    answer, end, _ = text.rpartition({end!r})
    ids = tokenizer((answer if end else text) + {end!r}, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return (model(input_ids=ids).logits.item() - {mean!r}) / {std!r}


print(reward([{{"role": "user", "content": "What is 1 + 1?"}}, {{"role": "assistant", "content": "2"}}]))
```

0 is an average answer of the validation pairs, 1 is one standard deviation above it. In a recipe of this project it is
`rewards: [{{name: reward_model, params: {{path: {path}}}}}]`.
"""
"""How a reward model is called without this project, in Markdown; see `write_usage`."""


def is_reward_model(options: ModelOptions) -> bool:
    """Whether the checkpoint is a sequence classifier already, such as a reward model that is to learn more."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(options.path, trust_remote_code=options.trust_remote_code)
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def load_reward_model(options: ModelOptions, tokenizer: Any, *, empty: bool = False) -> Any:
    """A sequence classifier of one label: from a policy with a head of zeros, or from a reward model as it is.

    With a head of zeros every completion is worth the same, and a pair's loss is ln 2. With `empty` it is as `without_content` makes it.
    Raises UserError when transformers cannot load the checkpoint, or has no classifier of its architecture.
    """
    from transformers import AutoModelForSequenceClassification as Classifier

    head = head_options(tokenizer, options.path)
    how: dict[str, Any] = {"dtype": DTYPES[options.dtype], "trust_remote_code": options.trust_remote_code}
    try:
        if empty:
            model = without_content(Classifier, options.path, **how, **head)
        else:
            with code_of(options.path, trusted=options.trust_remote_code), _no_load_report():
                model, report = Classifier.from_pretrained(options.path, **how, **head, output_loading_info=True)
            fill_head(model, set(report["missing_keys"]), options.path)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"model.path: transformers cannot make a reward model of {options.path}: {first_line(error)}"
        ) from None
    choose_kernels(model)
    return model


def fill_head(model: Any, missing: set[str], path: str) -> None:
    """Set the head to zero where the checkpoint at `path` has none. Raises UserError where it lacks other tensors, of those `missing`."""
    if missing - {HEAD}:
        raise UserError(
            f"model.path: {path} lacks {len(missing - {HEAD})} of the tensors of {type(model).__name__}, "
            f"{min(missing - {HEAD})} for one; give a checkpoint of that architecture"
        )
    if missing:
        torch.nn.init.zeros_(model.score.weight)


def padding_token_id(tokenizer: Any, path: str) -> int:
    """What a reward model's batches are padded with, and its tokenizer from here on: never the token that ends an answer.

    transformers scores a sequence at its last token that is no padding. Where padding and end are one token, as in
    DeepSeek-V2's tokenizer, that would be the token before the end. Raises UserError where there is no other token.
    """
    end = turn_end(tokenizer)
    for name in ("pad_token", "bos_token", "unk_token", "eos_token"):
        token_id = getattr(tokenizer, f"{name}_id")
        if token_id is not None and token_id != end:
            tokenizer.pad_token = getattr(tokenizer, name)
            return int(token_id)
    raise UserError(
        f"model.path: the tokenizer of {path} has no token to pad with but the one that ends an answer, at which reward "
        "models score; give it a pad_token of its own"
    )


def write_usage(directory: Path, tokenizer: Any, mean: float, std: float) -> None:
    """Write `README.md` beside a reward model's weights: how to call it, so that it reads what it was trained on.

    `mean` and `std` bring its numbers to the scale on which 0 is an average answer.
    """
    (directory / "README.md").write_text(usage(str(directory.absolute()), tokenizer, mean, std), encoding="utf-8")


def usage(path: str, tokenizer: Any, mean: float, std: float) -> str:
    """What `write_usage` writes of a reward model at a path or of that name on the hub."""
    end = tokenizer.convert_ids_to_tokens(turn_end(tokenizer))
    return USAGE.format(path=path, end=end, mean=mean, std=std or 1.0)


def head_options(tokenizer: Any, path: str) -> dict[str, Any]:
    """What the configuration of the reward model at a path says of its head. Raises UserError where there is no token to pad with."""
    # Servers read from the last that the number is wanted as it is, and not its sigmoid.
    return {"num_labels": 1, "pad_token_id": padding_token_id(tokenizer, path), "problem_type": "regression"}


def is_usage(text: str) -> bool:
    """Whether a text is what `write_usage` writes, of whatever reward model."""
    written = ".*".join(re.escape(literal) for literal, *_ in Formatter().parse(USAGE))
    return re.fullmatch(written, text) is not None


def tokenizer_hash(tokenizer: Any) -> str:
    """The SHA-256 of a tokenizer's vocabulary and chat template, which say what the ids of a conversation are."""
    content = [sorted(tokenizer.get_vocab().items()), tokenizer.get_chat_template()]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()


@contextmanager
def _no_load_report() -> Iterator[None]:
    """Silence transformers' report of missing weights: those of the new head are meant to be missing."""
    log = logging.getLogger("transformers")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
