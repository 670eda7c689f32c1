"""Rewards by name: those registered in this process, and those that installed packages announce.

A package announces a reward by an entry point of the group `moe_align.rewards`, whose name is the reward's
and whose value is the module (or the function in it) that registers it, imported when first asked for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any, TypeVar

from reward.types import ParameterError, RewardError, UnknownReward

ENTRY_POINT_GROUP = "moe_align.rewards"

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Parameter:
    """A setting of a reward; `default` means nothing where it is `required`."""

    name: str
    default: Any
    required: bool


@dataclass(frozen=True)
class Reward:
    """A registered reward.

    `function` maps `(sample, **params)` to a Score, or, where `batched`, `(samples, **params)` to a sequence
    of Scores in the same order. `description` is the first line of its docstring.
    """

    name: str
    function: Callable[..., Any]
    batched: bool
    description: str
    parameters: tuple[Parameter, ...]


_rewards: dict[str, Reward] = {}


def register(name: str, *, batched: bool = False) -> Callable[[Function], Function]:
    """A decorator that makes a function known as the reward `name`, and returns the function unchanged.

    Raises RewardError where another function has the name, or where the function takes `**kwargs`: a misspelt
    parameter would then pass unnoticed.
    """

    def decorate(function: Function) -> Function:
        known = _rewards.get(name)
        if known is not None and not _same_definition(known.function, function):
            raise RewardError(
                f"reward {name!r} is already registered by {_origin(known.function)}; "
                f"{_origin(function)} needs another name"
            )
        _rewards[name] = Reward(
            name=name,
            function=function,
            batched=batched,
            description=next(iter((inspect.getdoc(function) or "").splitlines()), ""),
            parameters=_parameters(name, function),
        )
        return function

    return decorate


def get(name: str) -> Reward:
    """The reward of that name. Raises UnknownReward, naming the nearest."""
    if name not in _rewards:
        announced = {point.name: point for point in metadata.entry_points(group=ENTRY_POINT_GROUP)}
        if name not in announced:
            raise UnknownReward(name, sorted({*_rewards, *announced}))
        _load(announced[name])
    return _rewards[name]


def available() -> list[Reward]:
    """Every reward by name, announced ones too. Raises RewardError where one of them cannot be loaded."""
    for point in metadata.entry_points(group=ENTRY_POINT_GROUP):
        _load(point)
    return sorted(_rewards.values(), key=lambda reward: reward.name)


def check_params(name: str, params: Mapping[str, Any]) -> None:
    """Nothing, if the reward `name` can be called with `params`.

    Raises UnknownReward, or ParameterError for a name it does not have (naming the nearest) or one it lacks.
    """
    parameters = get(name).parameters
    known = [parameter.name for parameter in parameters]
    for given in params:
        if given not in known:
            raise ParameterError(name, given, "unknown", known)
    for parameter in parameters:
        if parameter.required and parameter.name not in params:
            raise ParameterError(name, parameter.name, "missing", known)


def _load(point: metadata.EntryPoint) -> None:
    try:
        point.load()
    except Exception as error:
        raise RewardError(f"entry point {point.name} = {point.value}: {error}") from error
    if point.name not in _rewards:
        raise RewardError(f"entry point {point.name} = {point.value} did not register {point.name!r}")


def _parameters(name: str, function: Callable[..., Any]) -> tuple[Parameter, ...]:
    signature = list(inspect.signature(function).parameters.values())
    if any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in signature):
        raise RewardError(f"reward {name!r} must name its parameters: {_origin(function)} takes * or **")
    return tuple(Parameter(p.name, p.default, p.default is p.empty) for p in signature[1:])


def _same_definition(one: Callable[..., Any], other: Callable[..., Any]) -> bool:
    # A reloaded module defines its functions anew; functions local to one scope may share a qualified name.
    return one is other or (_origin(one) == _origin(other) and "<locals>" not in _origin(one))


def _origin(function: Callable[..., Any]) -> str:
    return f"{function.__module__}.{getattr(function, '__qualname__', type(function).__qualname__)}"
