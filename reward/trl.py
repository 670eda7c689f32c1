"""A registered reward as one of TRL's `reward_funcs`. TRL itself is not imported."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from reward.mixture import Mixture, RewardTerm, why_masked
from reward.rows import TRUTHS, sample_of_row, text_of
from reward.types import InfrastructureError

_log = logging.getLogger(__name__)

RECENT = 256
"""Of so many completions, or of a call's where it has more, the share is taken that nobody could judge."""


class TrlReward:
    """What `trl_reward_func` returns: a class and not a closure, so that it can be pickled."""

    def __init__(self, name: str, params: Mapping[str, Any], infra_error_limit: float) -> None:
        self.__name__ = name  # TRL names its metrics by it
        self._mixture = Mixture([RewardTerm(name=name, params=dict(params))], infra_error_limit=infra_error_limit)
        self._masked: list[bool] = []  # of the last completions: one call may hold those of a single prompt

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        token_ids = columns.get("completion_ids") or ()
        data = {
            name: column
            for name, column in columns.items()
            if name != "completion_ids" and isinstance(column, list) and len(column) == len(completions)
        }
        rows = [{name: column[index] for name, column in data.items()} for index in range(len(completions))]
        samples = [
            sample_of_row(
                row,
                completion if isinstance(completion, str) else text_of(completion[-1].get("content")),
                id=str(row.get("id", f"row {index}")),
                prompt=prompt,
                completion_tokens=len(token_ids[index]) if index < len(token_ids) else None,
            )
            for index, (row, prompt, completion) in enumerate(zip(rows, prompts, completions, strict=True))
        ]
        rewards = self._mixture.score_each(samples)
        if reasons := why_masked(samples, rewards):
            self._stop_or_warn(reasons, len(samples), has_answers=not data.keys().isdisjoint(TRUTHS))
        self._masked = [*self._masked, *(reward.value is None for reward in rewards)][-RECENT:]
        return [reward.value for reward in rewards]

    def _stop_or_warn(self, reasons: Sequence[str], count: int, has_answers: bool) -> None:
        earlier = self._masked[count - RECENT :] if count < RECENT else []
        share = (sum(earlier) + len(reasons)) / max(count, RECENT)
        limit = self._mixture.infra_error_limit
        if not has_answers and all("no ground truth" in reason for reason in reasons):
            raise InfrastructureError(len(reasons) / count, limit, f"{reasons[0]}; the data have no column 'answer'")
        if share > limit:
            raise InfrastructureError(share, limit, reasons[0])
        _log.warning("%d of %d samples masked. The first: %s", len(reasons), count, reasons[0])


def trl_reward_func(name: str, /, *, infra_error_limit: float = 0.5, **params: Any) -> TrlReward:
    """A callable `(prompts, completions, **columns) -> list of float | None` for TRL's `reward_funcs`.

    Prompts and completions are strings or lists of chat messages; of a completion the last message counts. Columns are read as
    `reward.rows` says: `answer`, or else `ground_truth` or `solution`, is the ground truth, `id` and `domain` are used if there are
    any, and every column is in the sample's metadata. None, which TRL leaves out, stands for a sample that nobody could judge. Where more than
    `infra_error_limit`, a share in [0, 1], of the last 256 completions are None, the call raises; so it does at once where
    the reward compares with ground truths and there is no column with any.

    TRL does not say which completions were cut off: let it mask them (`mask_truncated_completions`).

    Raises UnknownReward, ParameterError or RewardError here; InfrastructureError, and what `Mixture.score_each` raises, when
    called.
    """
    return TrlReward(name, params, infra_error_limit)
