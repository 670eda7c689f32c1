"""Token ids of conversations for the stages: `reward.chat` with the errors that the command line shows."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from align.errors import UserError
from reward import RewardError, chat

P = ParamSpec("P")
R = TypeVar("R")


def _for_users(function: Callable[P, R]) -> Callable[P, R]:
    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except RewardError as error:
            raise UserError(str(error)) from error

    return called


encode_prompt = _for_users(chat.encode_prompt)
encode_conversation = _for_users(chat.encode_conversation)
encode_example = _for_users(chat.encode_example)
answer_text = _for_users(chat.answer_text)
decode_completion = chat.decode_completion
