"""Open-ended benchmarks that a language model judges, behind an endpoint that speaks OpenAI's API (such as vLLM's server).

The questions are not ours to ship: they are given as a file of JSON lines with the fields that their authors publish.
`align.evaluate.judge_benchmarks` has what is asked of the judge and what is made of its verdicts. A judgement that the judge
did not give, or that cannot be read, is counted and left out: it is never a 0.
"""

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, FilePath, ValidationError

from align.errors import UserError
from align.evaluate.hooks import EvaluationError, Metrics, PolicyCheckpoint, refuse_no_room, register
from align.evaluate.judge_benchmarks import BENCHMARKS, MtBenchQuestion, MtBenchReference, Question, answered
from align.model.policy import first_line
from align.options import Options
from align.run.files import read_jsonl_lines
from reward.rows import text_of
from rollout import Fleet

if TYPE_CHECKING:
    from openai import AsyncOpenAI

Line = TypeVar("Line", bound=BaseModel)
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


def ready(
    benchmark: str,
    questions: Path,
    judge: JudgeOptions,
    template: Path | None = None,
    references: Path | None = None,
    max_new_tokens: int = 1024,
    max_length: int | None = None,
) -> None:
    """Raise UserError or EvaluationError unless the questions, references and template can be read, answers have room, and the judge answers."""
    refuse_no_room(max_new_tokens, max_length)
    with_references(read_questions(questions, BENCHMARKS[benchmark]), references)
    judge_template(benchmark, template)
    Judge(judge).check()


@register("judged", ready=ready)
def judged(
    checkpoint: PolicyCheckpoint,
    fleet: Fleet,
    *,
    benchmark: Literal["mt_bench", "alpaca_eval", "align_bench"],
    questions: FilePath,
    judge: JudgeOptions,
    template: FilePath | None = None,
    references: FilePath | None = None,
    max_new_tokens: Annotated[int, Field(ge=1)] = 1024,
    limit: Annotated[int, Field(ge=1)] | None = None,
    seed: int = 0,
) -> Metrics:
    """A judge's verdicts on the policy's answers to the first `limit` questions of a benchmark.

    `references`: for MT-Bench, the file of good answers that FastChat publishes beside its questions (`reference_answer/gpt-4.jsonl`).

    The judge is asked for a word before the policy is asked anything: UserError where it refuses, EvaluationError where it
    cannot be reached. Of the `judgements`, `failed` is the share that the judge did not give and `unreadable` the share without
    a verdict in them; where that is all of them, the benchmark is not run.
    """
    wanted = BENCHMARKS[benchmark]
    asked = with_references(read_questions(questions, wanted), references)[:limit]
    wording = judge_template(benchmark, template)
    endpoint = Judge(judge)
    endpoint.check()
    cases = answered(asked, checkpoint, fleet, max_new_tokens=max_new_tokens, seed=seed)
    judgements = endpoint.ask([wording.substitute(case.fields) for case in cases])
    verdicts = [
        None if judgement.text is None else case.question.read(judgement.text)
        for case, judgement in zip(cases, judgements, strict=True)
    ]
    failed = sum(judgement.text is None for judgement in judgements)
    unusable = sum(verdict is None for verdict in verdicts)
    values = wanted.values(asked, cases, verdicts) | {
        "judgements": len(cases),
        "failed": failed / len(cases),
        "unreadable": (unusable - failed) / len(cases),
    }
    not_run: dict[str, str] = {}
    if unusable == len(cases):
        first = judgements[0].error or f"no verdict in {(judgements[0].text or '')[-80:]!r}"
        not_run[benchmark] = f"none of the {len(cases)} judgements could be used; the first: {first}"
    rows: list[dict[str, Any]] = [
        {
            "id": case.id,
            "part": case.part,
            "category": case.question.category,
            "prompt": case.prompt,
            "completion": case.completion,
            "judgement": judgement.text,
            "verdict": None if verdict is None else str(verdict),
            "error": judgement.error,
        }
        for case, judgement, verdict in zip(cases, judgements, verdicts, strict=True)
    ]
    return Metrics({f"{benchmark}/{name}": value for name, value in values.items()}, not_run, rows)


def read_questions(file: Path, kind: type[Line]) -> list[Line]:
    """The questions of a file, or its other lines of a kind. Raises UserError with the line of one that lacks a field or has a wrong one."""
    questions: list[Line] = []
    for line, row in read_jsonl_lines(file):
        try:
            questions.append(kind.model_validate(row))
        except ValidationError as error:
            wrong = error.errors()[0]
            raise UserError(f"{file}, line {line}: {'.'.join(map(str, wrong['loc']))}: {wrong['msg']}") from None
    if not questions:
        raise UserError(f"{file} is empty: give the benchmark's questions, one JSON object on each line")
    return questions


def with_references(questions: Sequence[Question], file: Path | None) -> Sequence[Question]:
    """MT-Bench's questions with the good answers of a file. Raises UserError where it has none to any of them, or they are another benchmark's."""
    if file is None:
        return questions
    if not all(isinstance(question, MtBenchQuestion) for question in questions):
        raise UserError("judged: references are for mt_bench alone: leave them out")
    good = {str(line.question_id): line.choices[0].turns for line in read_questions(file, MtBenchReference)}
    if not any(str(question.question_id) in good for question in questions):
        raise UserError(f"{file}: it has no answer to any of the questions, whose question_id is another")
    return [
        question.model_copy(update={"reference": good[str(question.question_id)]})
        if str(question.question_id) in good
        else question
        for question in questions
    ]


def judge_template(benchmark: str, file: Path | None) -> Template:
    """The template of a benchmark, ours or the user's. Raises UserError for one that the benchmark cannot fill in."""
    ours = Template((Path(__file__).parent / "templates" / f"{benchmark}.txt").read_text(encoding="utf-8"))
    needed = BENCHMARKS[benchmark].needed
    if file is None:
        return ours
    template = Template(file.read_text(encoding="utf-8"))
    known, used = set(ours.get_identifiers()), set(template.get_identifiers())
    wrong = [f"has no ${name}" for name in sorted(needed - used)] + [f"uses ${name}" for name in sorted(used - known)]
    if not template.is_valid():
        wrong.append("has a $ that begins no placeholder (write $$ for the sign itself)")
    if wrong:
        names = ", ".join(f"${name}" for name in sorted(known))
        raise UserError(f"{file}: a template for {benchmark} {'; '.join(wrong)}. Its placeholders are {names}")
    return template


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the judge said, or None and the reason why it said nothing."""

    text: str | None
    error: str = ""


class Judge:
    """A language model behind an endpoint, asked at temperature 0 unless it takes no temperature."""

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
        self._unsupported: set[str] = set()

    def check(self) -> None:
        """Ask for a word. Raises UserError where the endpoint refuses, EvaluationError where it cannot be reached.

        With all attempts it takes no longer than one attempt may.
        """
        import openai

        where = f"the judge {self._options.model!r} at {self._options.base_url}"
        limit = self._options.timeout_s
        try:
            asyncio.run(asyncio.wait_for(self._ask_once("Say yes."), limit))
        except (openai.APITimeoutError, TimeoutError):
            why = f"no answer within judge.timeout_s = {limit:g} s"
            raise EvaluationError(f"{where} cannot be asked: {why}") from None
        except (openai.APIConnectionError, openai.InternalServerError, openai.RateLimitError) as error:
            raise EvaluationError(f"{where} cannot be asked: {self._reason(error)}") from None
        except (openai.OpenAIError, _NoCompletionError) as error:
            raise UserError(
                f"{where} refuses: {self._reason(error)}; check judge.base_url, judge.model and judge.api_key_env"
            ) from None

    def ask(self, prompts: Sequence[str]) -> list[Judgement]:
        """A judgement of each prompt, in their order.

        Once GIVE_UP_AFTER requests in a row have failed, the endpoint counts as down and the rest is not asked.
        """
        return asyncio.run(self._ask_all(prompts))

    async def _ask_once(self, prompt: str) -> str:
        async with self._client() as client:
            return await self._complete(client, prompt)

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
                text = await self._complete(client, prompt)
            except (openai.OpenAIError, _NoCompletionError, TimeoutError) as error:
                # A prompt that is refused says nothing about the next one.
                self._failures += not isinstance(error, openai.BadRequestError)
                return Judgement(None, self._reason(error))
            self._failures = 0
            return Judgement(text)

    def _client(self) -> "AsyncOpenAI":
        from openai import AsyncOpenAI

        # Without a key from us the client would take one from the environment and send it to whatever endpoint this is.
        key, options = self._key or "none", self._options
        return AsyncOpenAI(
            base_url=options.base_url, api_key=key, timeout=options.timeout_s, max_retries=options.retries
        )

    async def _complete(self, client: "AsyncOpenAI", prompt: str) -> str:
        # The client's limit is on the time between two bytes: an endpoint that never ends needs another one.
        async with asyncio.timeout((self._options.timeout_s + LONGEST_BACKOFF_S) * (self._options.retries + 1)):
            try:
                answer = await self._ask_in_its_words(client, prompt)
            except UnicodeEncodeError as error:  # of the key or of the prompt
                raise _NoCompletionError(f"the request cannot be sent: {first_line(error)}") from None
            except ValueError as error:  # of the client: a body that is no JSON
                raise _NoCompletionError(f"what it sent is no JSON: {first_line(error)}") from None
        try:
            # A model that thinks may answer in parts, of which those of its thought have no text.
            return text_of(answer.choices[0].message.content)
        except (AttributeError, LookupError, TypeError):
            raise _NoCompletionError("what it sent is no chat completion") from None

    async def _ask_in_its_words(self, client: "AsyncOpenAI", prompt: str) -> Any:
        """Ask, and again without what the endpoint names as unsupported: reasoning models take no temperature, and `max_completion_tokens` alone."""
        import openai

        while True:
            limit = "max_completion_tokens" if "max_tokens" in self._unsupported else "max_tokens"
            given = {"temperature": 0.0, limit: self._options.max_tokens}
            sent = {name: value for name, value in given.items() if name not in self._unsupported}
            try:
                return await client.chat.completions.create(
                    model=self._options.model, messages=[{"role": "user", "content": prompt}], extra_body=sent
                )
            except openai.BadRequestError as error:
                if error.param not in [name for name in ("temperature", "max_tokens") if name in sent]:
                    raise
                self._unsupported.add(error.param)

    def _reason(self, error: Exception) -> str:
        """Why a request failed, in one line and without the key, which some endpoints repeat."""
        cause = f" ({first_line(error.__cause__)})" if isinstance(error.__cause__, Exception) else ""
        text = (first_line(error) or type(error).__name__) + cause
        return text.replace(self._key, "***") if self._key else text


class _NoCompletionError(Exception):
    """The endpoint answered with something else than a chat completion."""
