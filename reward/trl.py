"""A registered reward as one of TRL's `reward_funcs`. TRL itself is not imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reward.mixture import Mixture, RewardTerm
from reward.types import Sample

_NOT_DATA = ("completion_ids",)


class TrlReward:
    """What `trl_reward_func` returns: a class and not a closure, so that it can be pickled."""

    def __init__(self, name: str, params: Mapping[str, Any]) -> None:
        self.__name__ = name  # TRL names its metrics by it
        self._mixture = Mixture([RewardTerm(name=name, params=dict(params))])

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        rows = {
            name: column
            for name, column in columns.items()
            if name not in _NOT_DATA and isinstance(column, list) and len(column) == len(completions)
        }
        samples = [
            _sample(index, prompt, completion, {name: column[index] for name, column in rows.items()})
            for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]
        return [reward.value for reward in self._mixture.score(samples)]


def trl_reward_func(name: str, /, **params: Any) -> TrlReward:
    """A callable `(prompts, completions, **columns) -> list of float | None` for TRL's `reward_funcs`.

    Prompts and completions are strings or lists of chat messages; of a completion the last message counts.
    The column `answer` is the ground truth, `id` and `domain` are used if there are any, and every column is
    in the sample's metadata. None, which TRL leaves out, stands for a sample that nobody could judge.

    TRL does not say which completions were cut off: let it mask them (`mask_truncated_completions`).

    Raises UnknownReward or ParameterError here, and what `Mixture.score` raises when called.
    """
    return TrlReward(name, params)


def _sample(index: int, prompt: Any, completion: Any, row: Mapping[str, Any]) -> Sample:
    answer = row.get("answer")
    return Sample(
        id=str(row.get("id", f"row {index}")),
        prompt=prompt if isinstance(prompt, str) else "\n".join(_content(message) for message in prompt),
        completion=completion if isinstance(completion, str) else _content(completion[-1]),
        answer=None if answer is None else str(answer),
        domain=str(row.get("domain", "math")),
        metadata=row,
    )


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or "" for part in content)
