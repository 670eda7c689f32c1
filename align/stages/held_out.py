"""The held-out side of a stage: its evaluation problems, and the probe of sampler against learner."""

from align.config import Recipe
from align.data.cards import load_card
from align.data.loader import load_split
from align.evaluate.agreement import Disagreement, probe
from align.evaluate.problems import Evaluation, encode_prompts, evaluate
from align.learner.group import LearnerGroup
from align.stages.engines import Engines
from align.stages.run import Run
from reward import Mixture

PROBE_PROMPTS = 8


class HeldOut:
    """What a stage asks of the policy besides training it. Everything the recipe names is loaded and checked at once."""

    def __init__(self, recipe: Recipe, engines: Engines, run: Run):
        options = recipe.evaluation
        self._stage, self._options, self._seed = recipe.stage, options, recipe.seed
        self._engines, self._run = engines, run
        self.mixture = Mixture(recipe.rewards)
        self.examples = load_split(
            load_card(options.card or recipe.data.card),
            options.split,
            path=options.path,
            limit=options.limit,
            levels=options.levels,
        ).examples
        longest = recipe.rollout.max_length - options.max_new_tokens
        self._probe = encode_prompts(engines.tokenizer, self.examples, longest)[:PROBE_PROMPTS]

    def evaluate(self, name: str, step: int) -> Evaluation:
        """Answer the held-out problems with the weights that the rollout workers hold, and record the result."""
        self._run.progress.phase(f"evaluating ({name})")
        evaluation = evaluate(
            self._engines.fleet,
            self._engines.tokenizer,
            self.examples,
            self.mixture,
            samples=self._options.samples,
            max_new_tokens=self._options.max_new_tokens,
            seed=self._seed,
        )
        self._run.record_evaluation(self._stage, step, name, evaluation)
        return evaluation

    def check_agreement(self, learner: LearnerGroup, when: str) -> Disagreement:
        """Probe sampler and learner on fixed prompts. Raises AgreementError beyond the recipe's limit."""
        found = self._engines.gate.check(probe(self._engines.fleet, learner, self._probe), when)
        self._run.progress.note(
            f"agreement {when}: sampler and learner differ by {found.mean:.1e} nats a token on average, "
            f"{found.largest:.1e} at most"
        )
        return found
