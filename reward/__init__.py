r"""Verifiable rewards for any trainer: a sample in, a number or None out.

    from reward import Mixture, RewardTerm, Sample

    mixture = Mixture([RewardTerm(name="exact_answer"), RewardTerm(name="answer_format", weight=0.1)])
    samples = [Sample(id="1", prompt="2 + 2?", completion=r"It is \boxed{4}.", ground_truth="4")]
    rewards = mixture.score(samples)
    assert rewards[0].value == 1.1  # None would mean: nobody could judge it, leave it out

A reward of your own is a function in a file (`name="my_rewards.py:says_unit"`, see `reward.own`), or one with `@register("name")` over it.
Start reading at `reward.types`.
"""

from reward import form, instructions, nano_chat, older_names  # noqa: F401 (these and the next five register rewards)
from reward.code import answer as _code  # noqa: F401
from reward.learned import endpoint as _endpoint  # noqa: F401
from reward.learned import model as _model  # noqa: F401
from reward.math import answer as _math  # noqa: F401
from reward.math.final_answer import boxed_answers, equal, extract_final_answer, normalise
from reward.mixture import Mixture, RewardTerm
from reward.own import batched, columns
from reward.pool import ScoringPool, Ticket
from reward.reasoning_gym import answer as _reasoning_gym  # noqa: F401
from reward.registry import Parameter, Reward, available, check_params, get, register
from reward.trl import trl_reward_func
from reward.types import (
    DomainError,
    InfrastructureError,
    ParameterError,
    RewardContractError,
    RewardError,
    Sample,
    SampleReward,
    Score,
    UnknownReward,
    UnusableAnswer,
    Verdict,
)

__all__ = [
    "DomainError",
    "InfrastructureError",
    "Mixture",
    "Parameter",
    "ParameterError",
    "Reward",
    "RewardContractError",
    "RewardError",
    "RewardTerm",
    "Sample",
    "SampleReward",
    "Score",
    "ScoringPool",
    "Ticket",
    "UnknownReward",
    "UnusableAnswer",
    "Verdict",
    "available",
    "batched",
    "boxed_answers",
    "check_params",
    "columns",
    "equal",
    "extract_final_answer",
    "get",
    "normalise",
    "register",
    "trl_reward_func",
]

older_names.install()
__getattr__ = older_names.attribute
