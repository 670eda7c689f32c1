"""Functions by name: those registered in this process, and those that installed packages announce.

A package announces a reward by an entry point of the group `moe_align.rewards`, whose name is the reward's
and whose value is the module (or the function in it) that registers it, imported when first asked for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Generic, TypeVar

from reward.types import ParameterError, RewardError, UnknownReward

ENTRY_POINT_GROUP = "moe_align.rewards"

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Parameter:
    """A setting of a registered function; `default` means nothing where it is `required`."""

    name: str
    default: Any
    required: bool


@dataclass(frozen=True)
class Entry:
    """A function and its name. `description` is the first line of its docstring."""

    name: str
    function: Callable[..., Any]
    description: str
    parameters: tuple[Parameter, ...]


@dataclass(frozen=True)
class Reward(Entry):
    """A registered reward.

    `function` maps `(sample, **params)` to a Score, or, where `batched`, `(samples, **params)` to a sequence
    of Scores in the same order. `columns` are what it is known to read from a sample's metadata. `ready` takes some of its parameters, and
    raises where the reward could not be used.
    """

    batched: bool
    columns: tuple[str, ...] = ()
    ready: Callable[..., None] | None = None


E = TypeVar("E", bound=Entry)


@dataclass(frozen=True)
class Registry(Generic[E]):
    """The functions of one kind, such as "reward", in `entries` by name.

    Installed packages announce theirs under the entry point group `group`. What a function takes first, `subjects`
    of them, is what it is called on; the rest are its parameters. The last three fields make what is raised: `error`
    of a text, `unknown` of a name and the known ones, `misfit` of a name, a parameter, "unknown" or "missing", and
    the known parameters.
    """

    kind: str
    group: str
    entries: dict[str, E]
    subjects: int
    error: Callable[[str], Exception]
    unknown: Callable[[str, Collection[str]], Exception]
    misfit: Callable[[str, str, str, Collection[str]], Exception]

    def register(self, name: str, make: Callable[..., E], **more: Any) -> Callable[[Function], Function]:
        """A decorator that enters a function under `name`, as `make` of the fields of an Entry and `more`.

        It raises `error` where another function has the name, or where the function takes `**kwargs`: a misspelt
        parameter would then pass unnoticed.
        """

        def decorate(function: Function) -> Function:
            known = self.entries.get(name)
            if known is not None and not _same_definition(known.function, function):
                raise self.error(
                    f"{self.kind} {name!r} is already registered by {_origin(known.function)}; "
                    f"{_origin(function)} needs another name"
                )
            self.entries[name] = make(
                name=name,
                function=function,
                description=next(iter((inspect.getdoc(function) or "").splitlines()), ""),
                parameters=self._parameters(name, function),
                **more,
            )
            return function

        return decorate

    def get(self, name: str) -> E:
        """The entry of that name. Raises `unknown`, for a reward UnknownReward, which names the nearest."""
        if name not in self.entries:
            announced = {point.name: point for point in metadata.entry_points(group=self.group)}
            if name not in announced:
                raise self.unknown(name, sorted({*self.entries, *announced}))
            self._load(announced[name])
        return self.entries[name]

    def available(self) -> list[E]:
        """Every entry by name, announced ones too. Raises `error` where one of them cannot be loaded."""
        for point in metadata.entry_points(group=self.group):
            self._load(point)
        return sorted(self.entries.values(), key=lambda entry: entry.name)

    def check_params(self, name: str, params: Mapping[str, Any]) -> None:
        """Nothing, if the function `name` can be called with `params`. Raises `unknown` or `misfit`, for a reward UnknownReward or ParameterError."""
        self.check_fit(self.get(name), params)

    def check_fit(self, entry: Entry, params: Mapping[str, Any]) -> None:
        """Nothing, if the entry's function can be called with `params`. Raises `misfit`, for a reward ParameterError."""
        known = [parameter.name for parameter in entry.parameters]
        for given in params:
            if given not in known:
                raise self.misfit(entry.name, given, "unknown", known)
        for parameter in entry.parameters:
            if parameter.required and parameter.name not in params:
                raise self.misfit(entry.name, parameter.name, "missing", known)

    def _load(self, point: metadata.EntryPoint) -> None:
        try:
            point.load()
        except Exception as error:
            raise self.error(f"entry point {point.name} = {point.value}: {error}") from error
        if point.name not in self.entries:
            raise self.error(f"entry point {point.name} = {point.value} did not register {point.name!r}")

    def _parameters(self, name: str, function: Callable[..., Any]) -> tuple[Parameter, ...]:
        signature = list(inspect.signature(function).parameters.values())
        if any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in signature):
            raise self.error(f"{self.kind} {name!r} must name its parameters: {_origin(function)} takes * or **")
        return tuple(Parameter(p.name, p.default, p.default is p.empty) for p in signature[self.subjects :])


_rewards: Registry[Reward] = Registry("reward", ENTRY_POINT_GROUP, {}, 1, RewardError, UnknownReward, ParameterError)


def register(
    name: str, *, batched: bool = False, columns: Sequence[str] = (), ready: Callable[..., None] | None = None
) -> Callable[[Function], Function]:
    """A decorator that makes a function known as the reward `name`, and returns the function unchanged.

    `columns` are those of the data without which it scores nothing; "answer" is the ground truth, whatever column has it. `ready` is called
    before a run starts anything, with those of the parameters that it takes, and raises RewardError where the reward could not be used then:
    it looks at files and servers, and loads no model.

    Raises RewardError where another function has the name, or where the function takes `**kwargs`: a misspelt
    parameter would then pass unnoticed.
    """
    return _rewards.register(name, Reward, batched=batched, columns=tuple(columns), ready=ready)


get = _rewards.get
available = _rewards.available
check_params = _rewards.check_params
check_fit = _rewards.check_fit


def call_ready(ready: Callable[..., None] | None, arguments: Mapping[str, Any]) -> None:
    """Call what was registered as `ready`, if anything, with those of the arguments that it takes. Raises what it does."""
    if ready is not None:
        taken = inspect.signature(ready).parameters
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
        ready(**{name: value for name, value in arguments.items() if takes_all or name in taken})


def _same_definition(one: Callable[..., Any], other: Callable[..., Any]) -> bool:
    # A reloaded module defines its functions anew; functions local to one scope may share a qualified name.
    return one is other or (_origin(one) == _origin(other) and "<locals>" not in _origin(one))


def _origin(function: Callable[..., Any]) -> str:
    return f"{function.__module__}.{getattr(function, '__qualname__', type(function).__qualname__)}"
