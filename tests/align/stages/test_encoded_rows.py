"""A row that the chat template refuses is named in the error, whichever stage reads it."""

from collections.abc import Callable
from typing import Any

import pytest

from align.data.types import Example, Message, Preference
from align.errors import UserError
from align.experience import encode_problems
from align.model.policy import load_tokenizer
from align.recipe import ModelOptions
from align.stages import reward_model, sft

MESSAGES: tuple[Message, ...] = ({"role": "user", "content": "Q"},)
EXAMPLE = Example("row 7", MESSAGES, "It is 4.", None, "math")


@pytest.mark.parametrize(
    ("encode", "message"),
    [
        (lambda tokenizer: encode_problems(tokenizer, [EXAMPLE]), "prompt 'row 7': .* refuses .* not today"),
        (lambda tokenizer: sft.encode_demonstration(tokenizer, EXAMPLE), "example 'row 7': .* refuses .* not today"),
        (
            lambda tokenizer: reward_model.encode_pair(tokenizer, Preference("row 7", MESSAGES, "a", "b", "math"), 0.0),
            "preference 'row 7': .* refuses .* not today",
        ),
    ],
)
def test_a_refused_row_is_named(encode: Callable[[Any], object], message: str, policy: ModelOptions) -> None:
    tokenizer = load_tokenizer(policy.path)
    tokenizer.chat_template = "{{ raise_exception('not today') }}"
    with pytest.raises(UserError, match=message):
        encode(tokenizer)
