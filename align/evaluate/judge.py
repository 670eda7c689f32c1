"""A judge behind an OpenAI-compatible endpoint: prompts in, its judgements or the reasons why there are none out."""

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import Field

from align.errors import UserError
from align.evaluate.hooks import EvaluationError
from align.model.policy import first_line
from align.options import Options

if TYPE_CHECKING:
    from openai import AsyncOpenAI

LONGEST_BACKOFF_S = 120.0  # the longest that the client lets an endpoint put off the next attempt
GIVE_UP_AFTER = 10


class JudgeOptions(Options):
    """Who judges, and how patiently it is asked."""

    base_url: str = Field(pattern=r"^https?://[^\s@]+$", description="such as http://127.0.0.1:8000/v1")
    model: str = Field(min_length=1, description="name of the model at the endpoint")
    api_key_env: str | None = Field(
        None, pattern=r"^[A-Z_][A-Z0-9_]*$", description="environment variable that holds the key; never the key itself"
    )
    timeout_s: float = Field(120, gt=0, description="longest time of one attempt, in seconds")
    retries: int = Field(4, ge=0, description="attempts after the first, with growing pauses between them")
    concurrency: int = Field(8, ge=1, description="requests at one time")
    max_tokens: int = Field(2048, ge=16, description="longest judgement, in tokens")


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the judge said, or None and the reason why it said nothing."""

    text: str | None
    error: str = ""


class Judge:
    """Asks at temperature 0."""

    def __init__(self, options: JudgeOptions):
        """Raises UserError where the client is not installed, or the variable that should hold the key is not set."""
        try:
            import openai  # noqa: F401 (asked for here, where nothing has been done yet)
        except ImportError:
            raise UserError("judged needs the package openai: pip install 'moe-align[evaluation]'") from None
        self._options = options
        self._key = os.environ.get(options.api_key_env, "") if options.api_key_env else ""
        if options.api_key_env and not self._key:
            raise UserError(f"judge.api_key_env: the environment variable {options.api_key_env} is not set")
        self._failures = 0

    def check(self) -> None:
        """Ask for a word. Raises UserError where the endpoint refuses, EvaluationError where it cannot be reached.

        With all attempts it takes no longer than an attempt may.
        """
        import openai

        where = f"the judge {self._options.model!r} at {self._options.base_url}"
        try:
            asyncio.run(asyncio.wait_for(self._ask_once("Say yes."), self._options.timeout_s))
        except (openai.APITimeoutError, TimeoutError):
            raise EvaluationError(
                f"{where} cannot be asked: no answer within judge.timeout_s = {self._options.timeout_s:g} s"
            ) from None
        except (openai.APIConnectionError, openai.InternalServerError, openai.RateLimitError) as error:
            raise EvaluationError(f"{where} cannot be asked: {self._reason(error)}") from None
        except (openai.OpenAIError, _NoCompletionError) as error:
            raise UserError(
                f"{where} refuses: {self._reason(error)}; check judge.base_url, judge.model and judge.api_key_env"
            ) from None

    def ask(self, prompts: Sequence[str]) -> list[Judgement]:
        """A judgement of each prompt, in their order.

        When the endpoint has failed so many times in a row that it must be down, the rest is not asked any more.
        """
        return asyncio.run(self._ask_all(prompts))

    async def _ask_all(self, prompts: Sequence[str]) -> list[Judgement]:
        gate = asyncio.Semaphore(self._options.concurrency)
        async with self._client() as client:
            return await asyncio.gather(*(self._judgement(client, gate, prompt) for prompt in prompts))

    async def _judgement(self, client: "AsyncOpenAI", gate: asyncio.Semaphore, prompt: str) -> Judgement:
        import openai

        async with gate:
            if self._failures >= GIVE_UP_AFTER:
                return Judgement(None, f"not asked: the judge had failed {self._failures} times in a row")
            try:
                text = await self._complete(client, prompt, self._options.max_tokens)
            except (openai.OpenAIError, _NoCompletionError, TimeoutError) as error:
                # A prompt that is refused says nothing about the next one.
                self._failures += not isinstance(error, openai.BadRequestError)
                return Judgement(None, self._reason(error))
            self._failures = 0
            return Judgement(text)

    async def _ask_once(self, prompt: str) -> str:
        async with self._client() as client:
            return await self._complete(client, prompt, 16)

    def _client(self) -> "AsyncOpenAI":
        from openai import AsyncOpenAI

        # Without a key from us the client would take one from the environment and send it to whatever endpoint this is.
        return AsyncOpenAI(
            base_url=self._options.base_url,
            api_key=self._key or "none",
            timeout=self._options.timeout_s,
            max_retries=self._options.retries,
        )

    async def _complete(self, client: "AsyncOpenAI", prompt: str, max_tokens: int) -> str:
        # The client's limit is on the time between two bytes: an endpoint that never ends needs another one.
        async with asyncio.timeout((self._options.timeout_s + LONGEST_BACKOFF_S) * (self._options.retries + 1)):
            answer = await client.chat.completions.create(
                model=self._options.model,
                messages=[{"role": "user", "content": prompt}],
                temperature=0.0,
                max_tokens=max_tokens,
            )
        choices = getattr(answer, "choices", None)
        if not choices:
            raise _NoCompletionError("what it sent is no chat completion")
        return choices[0].message.content or ""

    def _reason(self, error: Exception) -> str:
        """Why a request failed, in one line and without the key, which some endpoints repeat."""
        cause = f" ({first_line(error.__cause__)})" if isinstance(error.__cause__, Exception) else ""
        text = (first_line(error) or type(error).__name__) + cause
        return text.replace(self._key, "***") if self._key else text


class _NoCompletionError(Exception):
    """The endpoint answered with something else than a chat completion."""
