"""Which part of the model the sampler and the learner compute otherwise, from a probe of a few prompts."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from align.evaluate.agreement import AgreementError
from align.experience import training_sequence
from align.learner.group import LearnerError, LearnerGroup
from rollout import Fleet, Prompt, RolloutError
from rollout.parts import HEAD, Distance

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 4, 32, 8
"""The size of a probe: what the parts of a large model compute for it still fits a message."""
LIMITS = {"float32": (1e-4, 1e-4), "bfloat16": (0.03, 0.2)}
"""Relative distances that rounding does not explain, of a part and of experts. Of small models with random weights, in bfloat16 beside float32, 0.002 to
0.011 was seen, and of experts 0.007 to 0.1 (to 0.13 over half as many tokens): some tokens go to others."""


@dataclass(frozen=True, slots=True)
class Attribution:
    """The relative distance of each part of the model, in the order in which they are computed, and what the dtype explains (`LIMITS`).

    Each layer is computed from what came into the sampler's layer. The head's distance is in nats: the mean |difference| of log-probabilities.
    """

    distances: dict[str, float]
    limits: tuple[float, float]

    @property
    def part(self) -> str | None:
        """The first part that is further apart than the limit of its kind."""
        limit, of_experts = self.limits
        far = (n for n, distance in self.distances.items() if not distance <= (of_experts if "experts" in n else limit))
        return next(far, None)

    def __str__(self) -> str:
        names = list(self.distances)
        if self.part is None:
            largest = max(names, key=self.distances.__getitem__)
            return (
                f"no part of the model differs in the probe of a few prompts (most: {largest}, {self.distances[largest]:.1e}): look at how large "
                "batches are computed, and at what becomes of logits, such as the temperature"
            )
        before = max((self.distances[name] for name in names[: names.index(self.part)]), default=0.0)
        return (
            f"they part in {self.part}, whose outputs differ by {self.distances[self.part]:.1e} of their size (all before it: {before:.1e} at "
            "most)"
        )

    @property
    def table(self) -> str:
        """A line for each layer."""
        lines: dict[str, list[str]] = {}
        for name, distance in self.distances.items():
            place, _, part = name.partition(", ")
            lines.setdefault(place, []).append(f"{part} {distance:.1e}".strip())
        return "\n".join(f"  {place}: {', '.join(parts)}" for place, parts in lines.items())


def attribute(fleet: Fleet, learner: LearnerGroup, prompts: Sequence[Prompt], dtype: str) -> Attribution:
    """Let the sampler continue a few prompts and the learner compute the same tokens, part by part. Raises RolloutError, LearnerError."""
    short = [Prompt(prompt.id, prompt.token_ids[:PROMPT_TOKENS]) for prompt in prompts[:PROMPTS]]
    sums: dict[str, Distance] = {}
    differences = []
    for noted in fleet.sample_parts(short, NEW_TOKENS):
        found, values = learner.part_distances(training_sequence(noted.trajectory), noted.parts)
        for name, distance in found.items():
            sums[name] = sums[name] + distance if name in sums else distance
        differences.append(np.abs(values.astype(np.float64) - noted.trajectory.log_probs))
    distances = {name: distance.relative for name, distance in sums.items()}
    return Attribution(distances | {HEAD: float(np.concatenate(differences).mean())}, LIMITS[dtype])


@contextmanager
def attributed(fleet: Fleet, learner: LearnerGroup, prompts: Sequence[Prompt], dtype: str) -> Iterator[None]:
    """Within the context, an AgreementError also says which part of the model sampler and learner compute otherwise."""
    try:
        yield
    except AgreementError as error:
        if learner.has_moved:
            # The sampler has the weights before the step's first update.
            raise
        try:
            where = str(attribute(fleet, learner, prompts, dtype))
        except (RolloutError, LearnerError) as failed:
            where = f"which part of the model it is could not be found out ({failed})"
        raise AgreementError(f"{error}\nWhere: {where}") from None
