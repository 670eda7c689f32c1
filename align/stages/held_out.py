"""What a stage asks of the policy besides training it: evaluation, agreement, and whether all of it is being trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from align.config import PolicyRecipe
from align.data.cards import load_card
from align.data.loader import load_split
from align.data.types import Example
from align.evaluate.agreement import AgreementGate, Disagreement, probe
from align.evaluate.problems import Evaluation, encode_prompts, evaluate
from align.learner.group import LearnerGroup
from align.stages.engines import Engines
from align.stages.run import Run
from rollout import Prompt

PROBE_PROMPTS = 8
CENSUS_STEP = 10


@dataclass(frozen=True, slots=True)
class Problems:
    """Held-out problems, and a few of their prompts to compare sampler and learner on."""

    examples: Sequence[Example]
    probe: Sequence[Prompt]


def load_problems(recipe: PolicyRecipe, tokenizer: Any) -> Problems:
    """The problems that the recipe evaluates on. Raises UserError for one that cannot be used."""
    options = recipe.evaluation
    examples = [
        example
        for card in recipe.evaluation_cards
        for example in load_split(
            load_card(card), options.split, path=options.path, limit=options.limit, levels=options.levels
        ).examples
    ]
    prompts = encode_prompts(tokenizer, examples, recipe.rollout.max_length - options.max_new_tokens)
    return Problems(examples, prompts[:: max(1, len(prompts) // PROBE_PROMPTS)][:PROBE_PROMPTS])


class HeldOut:
    """The questions of a stage."""

    def __init__(self, recipe: PolicyRecipe, problems: Problems, engines: Engines, run: Run):
        self._stage, self._options, self._seed = recipe.stage, recipe.evaluation, recipe.seed
        self._problems, self._engines, self._run = problems, engines, run
        self.gate = AgreementGate(recipe.agreement, engines.policy.dtype, run.warn)

    def evaluate(self, name: str, step: int) -> Evaluation:
        """Answer the held-out problems with the weights that the rollout workers hold, and record the result."""
        self._run.progress.phase(f"evaluating ({name})")
        evaluation = evaluate(
            self._engines.fleet,
            self._engines.tokenizer,
            self._problems.examples,
            self._engines.judges,
            samples=self._options.samples,
            max_new_tokens=self._options.max_new_tokens,
            seed=self._seed,
        )
        self._run.record_evaluation(self._stage, step, name, evaluation)
        return evaluation

    def check_agreement(self, learner: LearnerGroup, when: str) -> Disagreement:
        """Probe sampler and learner on fixed prompts. Raises AgreementError beyond the recipe's limit."""
        found = self.gate.check(probe(self._engines.fleet, learner, self._problems.probe), when)
        self._run.progress.note(
            f"agreement {when}: sampler and learner differ by {found.mean:.1e} nats a token on average, "
            f"{found.largest:.1e} at most"
        )
        return found

    def check_gradients(self, learner: LearnerGroup, steps: int) -> None:
        """Warn of parameters that have had no gradient in the first steps; an expert among them is not being trained."""
        missing = learner.missing_gradients()
        if missing:
            shown = ", ".join(missing[:4]) + (", ..." if len(missing) > 4 else "")
            self._run.warn(
                f"{len(missing)} trainable parameters or experts have had no gradient in {steps} steps: {shown}"
            )
