"""Evaluation hooks by name: what can be measured on a checkpoint after a stage.

    @register("mean_length")
    def mean_length(checkpoint: PolicyCheckpoint, fleet: Fleet, *, prompts: int = 100) -> Metrics: ...

A hook is asked for by its name. What it can find out before anything is trained, such as whether a server answers, is
in a function that names the parameters it looks at, `register("mean_length", ready=...)`. An installed package announces
one as it would a reward, by an entry point of the group `moe_align.evaluations`. What its parameters are annotated with,
pydantic checks before the stage begins.
"""

import logging
import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from numbers import Real
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from align.data.chat import answer_text
from align.data.types import Example, Message
from align.errors import UserError, nearest
from align.experience import encode_problems
from align.recipe import ModelOptions
from reward.registry import Entry, Function, Registry, call_ready
from rollout import FinishReason, Fleet, SamplingOptions

ENTRY_POINT_GROUP = "moe_align.evaluations"
_log = logging.getLogger(__name__)
RECORD_KEYS = ("stage", "step", "name", "split", "problems", "verdicts", "too_long", "not_run")
"""What a record of evaluations.jsonl says of an evaluation besides its numbers."""
OURS = ("drift", "instructions", "judged", "lm_eval", "needle")


class EvaluationError(Exception):
    """An evaluation could not be carried out, through no fault of the policy or the recipe; the message says why."""


@dataclass(frozen=True)
class Hook(Entry):
    """A registered hook; `ready` takes some of its parameters, and raises where it could not be run."""

    ready: Callable[..., None] | None


@dataclass(frozen=True, slots=True)
class Response:
    """What the policy said: its text, its length in tokens (0 where it was not asked), and whether it was cut off at a limit."""

    text: str
    tokens: int
    truncated: bool


@dataclass(frozen=True, slots=True)
class PolicyCheckpoint:
    """A policy as a stage wrote it; the fleet holds the same weights.

    `model.path` is the directory of its Hugging Face checkpoint. `max_length` is what the fleet has room for: prompt
    and completion together, in tokens. `start` is the model that the run began with, None where its weights were initialised
    at random.
    """

    model: ModelOptions
    tokenizer: Any
    max_length: int
    start: str | None = None

    def ask(
        self,
        fleet: Fleet,
        conversations: Mapping[str, Sequence[Message]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> dict[str, Response]:
        """The policy's response to each conversation by its id, in their order; greedy unless there is a temperature.

        A conversation that leaves no room for `max_new_tokens` is not put to it: the response is empty, and a warning counts
        such conversations.
        """
        examples = [Example(id_, tuple(messages), None, None, "evaluation") for id_, messages in conversations.items()]
        refuse_no_room(max_new_tokens, self.max_length)
        longest = self.max_length - max_new_tokens
        encoded = [problem.prompt for problem in encode_problems(self.tokenizer, examples)]
        prompts = [prompt for prompt in encoded if len(prompt.token_ids) <= longest]
        if len(prompts) < len(examples):
            _log.warning(
                "%d of %d conversations have more than the %d tokens that are left beside %d new ones: they count as not answered",
                *(len(examples) - len(prompts), len(examples), longest, max_new_tokens),
            )
        sampling = SamplingOptions(temperature=temperature, max_new_tokens=max_new_tokens)
        responses = {id_: Response("", 0, truncated=True) for id_ in conversations}
        for group in fleet.sample(prompts, 1, sampling, seed=seed, step=0) if prompts else ():
            (trajectory,) = group.trajectories
            responses[group.prompt.id] = Response(
                answer_text(self.tokenizer, conversations[group.prompt.id], trajectory.token_ids),
                len(trajectory.token_ids),
                trajectory.finish_reason is FinishReason.LENGTH,
            )
        return responses


@dataclass(frozen=True, slots=True)
class Metrics:
    """What a hook measured.

    `values` are finite numbers by name, with "/" between the parts of a name. `not_run` names what could not be
    measured, with the reason: that is never a 0. `rows` are records of single problems, all with the same kinds of
    values.
    """

    values: Mapping[str, float]
    not_run: Mapping[str, str] = field(default_factory=dict)
    rows: Sequence[Mapping[str, Any]] = ()


def _unknown(name: str, known: Collection[str]) -> UserError:
    return UserError(
        f"unknown evaluation hook {name!r}{nearest(name, known)}. Known hooks: {', '.join(known)}. An installed package announces its own by "
        f"an entry point of the group {ENTRY_POINT_GROUP}"
    )


def _misfit(hook: str, parameter: str, why: str, known: Collection[str]) -> UserError:
    hint = nearest(parameter, known) if why == "unknown" else ""
    named = ", ".join(known) or "none"
    return UserError(f"evaluation hook {hook!r}: {why} parameter {parameter!r}{hint}. Its parameters: {named}")


_hooks: Registry[Hook] = Registry("evaluation hook", ENTRY_POINT_GROUP, {}, 2, UserError, _unknown, _misfit)


def register(name: str, *, ready: Callable[..., None] | None = None) -> Callable[[Function], Function]:
    """A decorator that makes a function `(checkpoint, fleet, **params) -> Metrics` known as the hook `name`.

    `ready` is called before the stage, with those of the parameters that it names, and `max_length`, what the fleet will have room for, and raises UserError or
    EvaluationError where the hook could not be run after it. Raises UserError where another function has the name, or
    where the function takes `**kwargs`: a misspelt parameter would then pass unnoticed.
    """
    return _hooks.register(name, Hook, ready=ready)


def get(name: str) -> Hook:
    """The hook of that name. Raises UserError, naming the nearest."""
    _register_ours()
    return _hooks.get(name)


def available() -> list[Hook]:
    """Every hook by name, announced ones too. Raises UserError where one of them cannot be loaded."""
    _register_ours()
    return _hooks.available()


def check_params(name: str, params: Mapping[str, Any]) -> None:
    """Nothing, if the hook `name` can be called with `params`. Raises UserError, with the nearest known name."""
    _arguments(name, params)


def check_ready(name: str, params: Mapping[str, Any], max_length: int | None = None) -> None:
    """Nothing, if the hook `name` could be run now, with room for so many tokens, as far as it can tell. Raises UserError, before any work is lost."""
    hook, arguments = get(name), _arguments(name, params)
    if all(parameter.name != "max_length" for parameter in hook.parameters):
        arguments["max_length"] = max_length
    try:
        call_ready(hook.ready, arguments)
    except EvaluationError as error:
        raise UserError(f"evaluation hook {name!r}: {error}") from None


def refuse_no_room(max_new_tokens: int, max_length: int | None) -> None:
    """Raise EvaluationError where answers of so many tokens leave no room for a prompt in `max_length`, where that is known."""
    if max_length is not None and max_new_tokens >= max_length:
        raise EvaluationError(
            f"its max_new_tokens, {max_new_tokens}, leave no room for a prompt in rollout.max_length, {max_length}: lower the one, or raise the other"
        )


def run(name: str, checkpoint: PolicyCheckpoint, fleet: Fleet, params: Mapping[str, Any]) -> Metrics:
    """What the hook `name` measures on a checkpoint.

    Raises UserError for parameters that it cannot be called with, EvaluationError where it returns anything but
    Metrics of finite numbers under names other than `RECORD_KEYS`, and whatever it raises.
    """
    arguments = _arguments(name, params)
    metrics = get(name).function(checkpoint, fleet, **arguments)
    if not isinstance(metrics, Metrics):
        raise EvaluationError(f"evaluation hook {name!r} must return Metrics, but returned {type(metrics).__name__}")
    for key, value in metrics.values.items():
        if key in RECORD_KEYS:
            raise EvaluationError(
                f"evaluation hook {name!r}: a value cannot be called {key!r}, as the record of every evaluation has that key: give it another name"
            )
        if not isinstance(value, Real) or not math.isfinite(value):
            raise EvaluationError(f"evaluation hook {name!r}: {key} is {value!r}, where a finite number is expected")
    # NumPy's numbers are none to JSON.
    plain = {key: value if isinstance(value, int) else float(value) for key, value in metrics.values.items()}
    return replace(metrics, values=plain)


def _arguments(name: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """`params` as the hook's annotations have them."""
    hook = get(name)
    _hooks.check_params(name, params)
    try:
        annotations = get_type_hints(hook.function, include_extras=True)
    except NameError:
        # An annotation that only a type checker can read says nothing here.
        annotations = {}
    arguments = {}
    for parameter, value in params.items():
        try:
            arguments[parameter] = TypeAdapter(annotations.get(parameter, Any)).validate_python(value)
        except ValidationError as error:
            # What was given is not repeated: it may hold a secret.
            wrong = [(".".join([parameter, *map(str, e["loc"])]), e["msg"]) for e in error.errors(include_input=False)]
            problems = "; ".join(f"{where}: {what}" for where, what in wrong)
            raise UserError(f"evaluation hook {name!r}: {problems}") from None
    return arguments


def _register_ours() -> None:
    # Only now: they import this file.
    for module in OURS:
        import_module(f"align.evaluate.{module}")


def __getattr__(name: str) -> Any:
    if name == "Checkpoint":
        warnings.warn("align.evaluate.hooks.Checkpoint is called PolicyCheckpoint", DeprecationWarning, stacklevel=2)
        return PolicyCheckpoint
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
