"""What the doctor looks at with a running sampler and learner: that they agree, and that new weights arrive."""

from collections.abc import Sequence

from align.errors import UserError
from align.evaluate.agreement import AgreementError, AgreementGate, probe
from align.evaluate.attribution import Attribution, attributed
from align.evaluate.doctor import FAILED, OK, Check, Finding
from align.learner.batch import TrainingSequence
from align.learner.group import LearnerGroup
from align.learner.objective import Objective
from rollout import Fleet, Prompt

GIB = 2**30
LEARNER_ROOM, SAMPLER_ROOM = 6 * GIB, 8 * GIB
"""What the doctor's engines need on a GPU beside the weights: CUDA's context and the largest gradient; context, workspaces and KV cache."""


def examine_engines(fleet: Fleet, learner: LearnerGroup, prompts: Sequence[Prompt], gate: AgreementGate) -> list[Check]:
    """Check that sampler and learner agree, that an update changes nothing it should not, and that a changed one arrives.

    It trains the learner by one step on noise: for a learner that is thrown away afterwards, as `FrugalRank` is.
    """
    findings = {"sampler and learner": agreement(fleet, learner, prompts, gate)}
    learner.sync_weights(fleet, version=1)
    findings["after an update with the same weights"] = agreement(fleet, learner, prompts, gate)
    noise = [
        TrainingSequence.of_completion([*p.token_ids, *reversed(p.token_ids)], len(p.token_ids), 1e-2) for p in prompts
    ]
    learner.accumulate(noise, Objective())
    learner.apply(1e-3)
    stale = probe(fleet, learner, prompts)
    try:
        gate.check(stale, "stale weights")
    except AgreementError:
        findings["a skipped update shows"] = OK, f"mean difference {stale.mean:.1e}"
    else:
        told = f"with old weights the mean difference is only {stale.mean:.1e}: the gate could not tell"
        findings["a skipped update shows"] = FAILED, f"{told}. Cure: a lower agreement.stop_mean"
    learner.sync_weights(fleet, version=2)
    findings["after an update with changed weights"] = agreement(fleet, learner, prompts, gate)
    return [Check(name, *finding) for name, finding in findings.items()]


def agreement(fleet: Fleet, learner: LearnerGroup, prompts: Sequence[Prompt], gate: AgreementGate) -> Finding:
    """Sampler and learner give the sampler's tokens the same log-probabilities; where not, the part of the model that differs is named."""
    try:
        with attributed(fleet, learner, prompts, gate.dtype):
            found = gate.check(probe(fleet, learner, prompts), "doctor")
    except AgreementError as error:
        return FAILED, str(error)
    return OK, str(found).removeprefix("sampler and learner ")


def parts(found: Attribution) -> Finding:
    """Each part of the model computes the same in sampler and learner."""
    if found.part is None:
        return OK, f"none differs by more than {max(found.distances.values()):.1e} of its size"
    return FAILED, (
        f"sampler and learner: {found}. Cause: other weights there, or an engine that computes it otherwise. Cure: other versions of vLLM and "
        "transformers (make setup installs those of the lock file), or another model"
    )


def sampler_share(weights: float, card: float) -> float:
    """The share of a GPU of `card` bytes for a sampler beside a learner, where each holds `weights` bytes. Raises UserError where both do not fit."""
    share = (card - weights - LEARNER_ROOM) / card
    if share * card < weights + SAMPLER_ROOM:
        raise UserError(
            f"sampler and learner do not fit one GPU of {card / GIB:.0f} GiB: each holds {weights / GIB:.1f} GiB of weights, and beside them "
            f"they need {(LEARNER_ROOM + SAMPLER_ROOM) / GIB:.0f} GiB. Cure: two GPUs, or --dtype bfloat16 where it is float32"
        )
    return share
