"""Losses of pairs of completions: of reward models, and of a policy itself."""

from torch import Tensor
from torch.nn.functional import logsigmoid


def pairwise_loss(chosen: Tensor, rejected: Tensor, margins: Tensor | None = None) -> Tensor:
    """``-log sigmoid(r_chosen - r_rejected - margin)`` of each pair, ``[B]``, without its weight.

    The negative log-likelihood of the preferences under Bradley and Terry's model (Ouyang et al. 2022,
    arXiv:2203.02155, eq. 1), with the margin of Llama 2 (arXiv:2307.09288, eq. 2). The DeepSeek-V2 report trains its
    reward models "with either a point-wise or a pair-wise loss" (section 4.2) and prints neither. ``chosen``,
    ``rejected`` and ``margins`` are ``[B]``. Only differences count: a constant added to all rewards changes nothing.
    """
    difference = chosen - rejected
    return -logsigmoid(difference if margins is None else difference - margins)


def pointwise_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """``-(log sigmoid(r_chosen) + log(1 - sigmoid(r_rejected))) / 2`` of each pair, ``[B]``, without its weight.

    The binary cross-entropy of both completions, each judged alone: label 1 for the chosen, 0 for the rejected one, as
    the outcome reward models of Cobbe et al. 2021 (arXiv:2110.14168) and Math-Shepherd (arXiv:2312.08935) are trained.
    ``sigmoid(r)`` is then the probability that a completion is right, and r > 0 says that it more likely is.
    """
    return -(logsigmoid(chosen) + logsigmoid(-rejected)) / 2


def dpo_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """DPO's loss of each pair, ``-log sigmoid(beta (chosen - rejected))``, ``[B]``, without its weight.

    Rafailov et al. 2023, arXiv:2305.18290, eq. 7: the loss of a reward model (:func:`pairwise_loss`) whose reward is ``beta log(pi / pi_ref)`` of
    a completion. ``chosen`` and ``rejected`` ``[B]`` are these logarithms, in nats: by how much the policy has raised the log-probability of each
    completion against its reference.
    """
    return pairwise_loss(beta * chosen, beta * rejected)
