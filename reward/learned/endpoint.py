"""A reward model behind a server that classifies, such as vLLM's: `POST /classify` with token ids, numbers back.

The ids are made here, by the checkpoint's own tokenizer: a server that is sent text would add a second BOS to what the chat
template has begun, and take a special token that a completion spells out for the real one.
"""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from reward.learned.model import encode_conversation, read_scale, score_conversations
from reward.registry import register
from reward.types import RewardError, Sample, Score
from reward.vocabulary import as_its_file_says

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 10.0
RETRIED = (408, 429, 500, 502, 503, 504)


class _Unanswered(Exception):  # noqa: N818
    """The server did not give the numbers; the text says why."""


def _ready(path: str, **params: Any) -> None:
    """Raise RewardError where the server cannot be asked, unless what it serves is still to be made."""
    if not Path(path).is_absolute() or Path(path).exists():
        reward_endpoint([], path=path, **params)


@register("reward_endpoint", batched=True, ready=_ready)
def reward_endpoint(
    samples: Sequence[Sample],
    *,
    url: str,
    model: str,
    path: str,
    normalise: bool = True,
    clip: float | None = None,
    max_length: int | None = None,
    batch_size: int = 32,
    timeout_s: float = 60.0,
    attempts: int = 4,
    api_key_env: str | None = None,
) -> list[Score]:
    """The number that a reward model behind `url` gives to a completion; it passes above 0.

    `url` is that of the server, such as http://127.0.0.1:8000, and `model` the name it serves the reward model by. `path`
    is the checkpoint, or a directory with its tokenizer and `reward_model.json`. `normalise`, `clip` and `max_length` are
    those of the reward `reward_model`; give the server's own `max_length` where it takes fewer tokens than the tokenizer
    says, as it refuses a whole request for one conversation that is too long. A request of `batch_size` conversations may
    take `timeout_s` and is tried `attempts` times, with growing pauses; then its samples are INFRA_ERROR. The key for the
    server, if it wants one, is in the environment variable `api_key_env`.

    Raises RewardError, naming the url, where the server cannot be asked when the reward is made ready.
    """
    tokenizer = _tokenizer(path)
    encode = partial(encode_conversation, path, tokenizer)
    server = _Server(url.rstrip("/"), model, timeout_s, attempts, _key(api_key_env))
    scale = read_scale(path, normalise=normalise, clip=clip)
    if not samples:
        try:
            server.ask([encode([{"role": "user", "content": "?"}], "!")])
        except _Unanswered as error:
            raise RewardError(f"reward_endpoint: {server.url} cannot be used: {error}") from None
    return score_conversations(
        samples,
        encode,
        bos=tokenizer.bos_token_id,
        longest=min(max_length or tokenizer.model_max_length, tokenizer.model_max_length),
        scale=scale,
        numbers=lambda conversations: server.numbers(conversations, batch_size),
    )


@dataclass(frozen=True)
class _Server:
    url: str
    model: str
    timeout_s: float
    attempts: int
    key: str | None

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise RewardError(f"reward_endpoint: url must begin with http:// or https://, unlike {self.url!r}")
        if self.attempts < 1:
            raise RewardError(f"reward_endpoint: attempts must be 1 or more, not {self.attempts}")

    def numbers(self, conversations: Sequence[Sequence[int]], batch_size: int) -> list[float | str]:
        """The number of each conversation, or why there is none."""
        found: list[float | str] = []
        for start in range(0, len(conversations), batch_size):
            batch = conversations[start : start + batch_size]
            try:
                found += self.ask(batch)
            except _Unanswered as error:
                found += [f"{self.url}: {error}"] * len(batch)
        return found

    def ask(self, conversations: Sequence[Sequence[int]]) -> list[float]:
        """The numbers that the server gives. Raises _Unanswered when the last attempt has failed."""
        for attempt in range(1, self.attempts + 1):
            try:
                return self._ask_once(conversations)
            except _Retry as error:
                if attempt == self.attempts:
                    raise _Unanswered(f"{error} ({attempt} attempts)") from None
                time.sleep(min(FIRST_PAUSE_S * 2 ** (attempt - 1), LONGEST_PAUSE_S))
        raise AssertionError("an attempt returns or raises")

    def _ask_once(self, conversations: Sequence[Sequence[int]]) -> list[float]:
        # Without use_activation the server would hand out the sigmoid of the number.
        body = {"model": self.model, "input": [list(ids) for ids in conversations], "use_activation": False}
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(f"{self.url}/classify", json.dumps(body).encode(), headers)
        try:
            with _OPENER.open(request, timeout=self.timeout_s) as response:
                answer = json.load(response)
        except urllib.error.HTTPError as error:
            told = error.read(300).decode(errors="replace").strip()
            reason = self._without_key(f"HTTP {error.code} {error.reason}: {told}")
            raise (_Retry if error.code in RETRIED else _Unanswered)(reason) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _Retry(self._without_key(str(getattr(error, "reason", error)) or repr(error))) from None
        return _numbers(answer, len(conversations))

    def _without_key(self, text: str) -> str:
        return text.replace(self.key, "***") if self.key else text


class _Retry(_Unanswered):
    """It may answer the next time."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirection would take the key to another server: it is an error."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)


def _numbers(answer: Any, count: int) -> list[float]:
    try:
        found = {entry["index"]: entry["probs"] for entry in answer["data"]}
        numbers = [found[place] for place in range(count)]
        if any(len(one) != 1 for one in numbers):
            raise _Unanswered(f"the model has {len(numbers[0])} classes, where a reward model has one")
        return [float(one[0]) for one in numbers]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise _Unanswered(f"what it sent is no answer to {count} conversations: {error!r}") from None


@lru_cache(maxsize=8)
def _tokenizer(path: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return as_its_file_says(AutoTokenizer.from_pretrained(path, mistral_format=False), path)
    except (OSError, ValueError) as error:
        raise RewardError(f"reward_endpoint: {path} has no tokenizer: {str(error).strip().splitlines()[0]}") from None


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    if not os.environ.get(variable):
        raise RewardError(
            f"reward_endpoint: the environment variable {variable}, which api_key_env names, is not set in the process that scores; on a Ray cluster that "
            "others started, set it before `ray start` on every node"
        )
    return os.environ[variable]
