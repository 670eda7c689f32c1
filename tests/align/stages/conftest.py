"""Stages without engines: a sampler that writes what it is told to, and a learner that notes what it is given.

They stand at the interfaces of rollout fleet, scoring pool and learner group; data, advantages, losses, alarms and files are real.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from align.evaluate.accuracy import Evaluation
from align.learner.batch import TrainingSequence
from align.learner.group import LearnerGroup
from align.learner.objective import Objective, Sums
from align.learner.routing import Changes
from align.model.policy import load_tokenizer
from align.recipe import ModelOptions, PolicyRecipe, load_recipe
from align.run.checkpoints import hashed_file
from align.session.run import Run, open_run
from align.session.session import Session
from align.stages import dpo, grpo, sft
from align.stages.held_out import HeldOut
from reward import Mixture, RewardTerm, Sample, SampleReward, Score, Verdict
from rollout import FinishReason, Group, Prompt, RolloutError, SamplingOptions, Trajectory

ROOT = Path(__file__).parents[3]
MEAN_LOG_PROB = -0.5


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@dataclass(frozen=True, slots=True)
class Written:
    """A completion that the sampler returns, and what its components are worth; None where nobody can judge."""

    tokens: int = 2
    worth: float | Mapping[str, float] | None = 0.0
    truncated: bool = False


@dataclass(slots=True)
class Accumulated:
    """A call of the learner's `accumulate`, and the rate that was applied to its gradient."""

    sequences: list[TrainingSequence]
    objective: Objective
    rate: float | None = None


@dataclass(slots=True)
class FakeFleet:
    """Completions as `write(step, place of the prompt, index)` says, by the fields of `Written`."""

    write: Callable[[int, int, int], Mapping[str, Any]]
    weight_version: int = 0
    calls: list[dict[str, Any]] = field(default_factory=list)
    worth: dict[str, Any] = field(default_factory=dict)
    loaded: list[tuple[Any, int]] = field(default_factory=list)

    def wait_until_ready(self) -> None: ...

    def load(self, source: Any, version: int, modules: Sequence[str] | None = None) -> None:
        self.loaded.append((source, version))
        self.weight_version = version

    def sample(
        self, prompts: Sequence[Prompt], group_size: int, sampling: SamplingOptions, **seeds: Any
    ) -> Iterator[Group]:
        asked = {"sampling": sampling, "version": self.weight_version, "prompts": [prompt.id for prompt in prompts]}
        self.calls.append(seeds | asked)
        for place, prompt in reversed(list(enumerate(prompts))):
            written = [Written(**self.write(seeds["step"], place, index)) for index in range(group_size)]
            self.worth |= {f"{prompt.id}#{index}": one.worth for index, one in enumerate(written)}
            yield Group(prompt, [self._trajectory(prompt, index, one) for index, one in enumerate(written)])

    def sample_parts(self, prompts: Sequence[Prompt], max_new_tokens: int) -> Any:
        raise RolloutError("there is no engine")

    def _trajectory(self, prompt: Prompt, index: int, written: Written) -> Trajectory:
        reason = FinishReason.LENGTH if written.truncated else FinishReason.STOP
        tokens, log_probs = [5] * written.tokens, [MEAN_LOG_PROB] * written.tokens
        return Trajectory.of_one_turn(prompt, index, tokens, log_probs, reason, weight_version=self.weight_version)


@dataclass(slots=True)
class FakePool:
    """Scores of the completions that the fleet wrote."""

    fleet: FakeFleet

    def submit(self, samples: Sequence[Sample]) -> list[Sample]:
        return list(samples)

    def gather(self, tickets: Sequence[list[Sample]], *, alone: bool = False) -> list[list[SampleReward]]:
        rewards = [[self._reward(self.fleet.worth[sample.id]) for sample in samples] for samples in tickets]
        mixture = Mixture([RewardTerm(name="exact_answer")], infra_error_limit=1.0)
        mixture.refuse_too_many_masked(list(chain(*tickets)), list(chain(*rewards)))
        return rewards

    def _reward(self, worth: float | Mapping[str, float] | None) -> SampleReward:
        if worth is None:
            return SampleReward(
                None, Verdict.INFRA_ERROR, {"exact_answer": Score(float("nan"), Verdict.INFRA_ERROR, "no sandbox")}
            )
        parts = worth if isinstance(worth, Mapping) else {"exact_answer": worth}
        verdict = Verdict.PASS if next(iter(parts.values())) > 0 else Verdict.WRONG
        scores = {name: Score(value, verdict) for name, value in parts.items()}
        return SampleReward(next(iter(parts.values())), verdict, scores)


@dataclass(slots=True)
class FakeLearner:
    """A learner of which each gradient has the norm 1. Its log-probability of token t of sequence number n is -(n + 1) / (t + 1)."""

    sent: int = 0
    difference: float = 0.0
    missing: list[str] = field(default_factory=list)
    batches: list[Accumulated] = field(default_factory=list)
    asked: list[tuple[int, float, int]] = field(default_factory=list)
    trained: Any = field(default_factory=lambda: SimpleNamespace(description="fake", modules=None))
    bad_updates: int = 0
    updates: int = 0
    is_idle: bool = True
    reference: ModelOptions | None = None
    teacher: ModelOptions | None = None
    replay: str = "off"
    has_moved: bool = False
    routes: list[Changes] = field(default_factory=list)  # of one batch after the other
    asked_for_missing: int = 0
    loads: list[dict[str, float]] = field(default_factory=list)

    def wait_until_ready(self) -> None: ...

    def check_shared(self, file: Path) -> None: ...

    def close(self) -> None: ...

    def accumulate(self, sequences: Sequence[TrainingSequence], objective: Objective) -> Sums:
        self.batches.append(Accumulated(list(sequences), objective))
        tokens = sum(s.sampled_tokens for s in sequences)
        apart = self.difference * tokens
        sums = Sums(
            tokens=tokens, padded_tokens=2 * tokens, entropy=tokens, compared=tokens, difference=apart, loss=0.5
        )
        sums.teacher_kl = 0.25 * tokens
        sums.routes = self.routes[len(self.batches) - 1 :][:1]
        sums.log_probs = [[np.full(s.sampled_tokens, -s.weight, dtype=np.float32) for s in sequences]]
        if objective.dpo is not None:
            sums.log_probs = [self._log_probs(sequences)]
            sums.reference_log_probs = [self._log_probs(sequences, of_reference=True)]
        return sums

    def apply(self, learning_rate: float) -> float:
        self.updates += 1
        self.batches[-1].rate = learning_rate
        return 1.0

    def log_probs(
        self,
        sequences: Sequence[TrainingSequence],
        temperature: float,
        *,
        as_sent: bool = False,
        of_reference: bool = False,
    ) -> list[Any]:
        if not of_reference:
            self.asked.append((len(sequences), temperature, len(self.batches)))
        return self._log_probs(sequences, of_reference=of_reference)

    def _log_probs(self, sequences: Sequence[TrainingSequence], *, of_reference: bool = False) -> list[Any]:
        """Twice as low of the reference."""
        scale = -2 if of_reference else -1
        return [scale * (n + 1) / np.arange(1, s.sampled_tokens + 1, dtype=np.float32) for n, s in enumerate(sequences)]

    update, _before_updates = LearnerGroup.update, LearnerGroup._before_updates

    def expert_load(self) -> dict[str, float]:
        return self.loads.pop(0) if self.loads else {}

    def missing_gradients(self) -> list[str]:
        self.asked_for_missing += 1
        return self.missing

    def sync_weights(self, fleet: FakeFleet, version: int) -> int:
        self.sent += 1
        fleet.load(self.sent, version)
        return 8

    def adapter_lost(self) -> None: ...

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        (directory / "weights").write_text(str(len(self.batches)))

    def save_state(self, directory: Path) -> dict[str, Any]:
        with hashed_file(directory / "rank_00000.pt") as (file, entry):
            file.write(b"state")
        return {"rank_00000.pt": entry}

    def load_state(self, directory: Path) -> None: ...


@pytest.fixture
def fake_learner() -> type[FakeLearner]:
    return FakeLearner


@dataclass(slots=True)
class Stage:
    """A stage that has been run, and all that it asked for."""

    recipe: Any
    run: Run
    fleet: FakeFleet
    learner: FakeLearner
    data: Any = None
    checked: list[str] = field(default_factory=list)
    evaluated: list[str] = field(default_factory=list)

    def lines(self, name: str) -> list[dict[str, Any]]:
        """What the run wrote into one of its files of JSON lines."""
        file = self.run.directory.path / name
        return [json.loads(line) for line in file.read_text().splitlines()]

    @property
    def warnings(self) -> list[dict[str, Any]]:
        return [event for event in self.lines("events.jsonl") if event["kind"] == "warning"]

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [line for line in self.lines("metrics.jsonl") if "loss" in line]


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Stage]:
    """Runs the stage of a nano recipe with some changes: `train("grpo", "grpo.steps=2", write=..., missing=[...])`; what is not known is the learner's."""

    def run_stage(
        name: str,
        *overrides: str,
        write: Callable[[int, int, int], Mapping[str, Any]] = lambda step, place, index: {"worth": float(index % 2)},
        weight_version: int = 0,
        **learns: Any,
    ) -> Stage:
        learner = learns.pop("learner", None) or FakeLearner(**learns)
        card = "nano_helpful" if name == "dpo" else "nano_math"
        fixed = {
            "grpo": ["init_from=null"],
            "dpo": ["model={path: recipes/nano/policy, init: random}"],
        }.get(name, [])
        recipe = load_recipe(
            Path(f"recipes/nano/{name}.yaml"),
            [
                *fixed,
                f"run.dir={tmp_path / 'run'}",
                "evaluation.limit=4",
                f"data={{card: {card}, limit: 64}}",
                *overrides,
            ],
        )
        assert isinstance(recipe, PolicyRecipe)

        def start(
            self: Session,
            options: Any,
            seed: int,
            reference: ModelOptions | None = None,
            replay: str = "off",
            teacher: ModelOptions | None = None,
        ) -> Any:
            learner.reference, learner.replay, learner.teacher = reference, replay, teacher
            return learner

        monkeypatch.setattr(Session, "new_learner", start)
        monkeypatch.setattr(HeldOut, "check_agreement", lambda self, learner, when: stage.checked.append(when))
        monkeypatch.setattr(HeldOut, "evaluate", lambda self, when, step: rated(when))
        fleet = FakeFleet(write, weight_version)
        tokenizer = load_tokenizer(recipe.model.path)

        def rated(when: str) -> Evaluation:
            stage.evaluated.append(when)
            return Evaluation(problems=1, accuracy=1.0, mean_length=1.0, truncated=0.0)

        with open_run(recipe) as run:
            stage = Stage(recipe, run, fleet, learner)
            session = Session(run, recipe.model, tokenizer)
            session.fleet = fleet  # type: ignore[assignment]
            session.pool = FakePool(fleet) if recipe.rewards else None  # type: ignore[assignment]
            if name == "grpo":
                stage.data = grpo.load_grpo_data(recipe, tokenizer, run)  # type: ignore[arg-type]
                grpo.train_grpo(recipe, stage.data, session)  # type: ignore[arg-type]
            elif name == "dpo":
                stage.data = dpo.load_dpo_data(recipe, tokenizer, run)  # type: ignore[arg-type]
                dpo.train_dpo(recipe, stage.data, session)  # type: ignore[arg-type]
            else:
                stage.data = sft.load_sft_data(recipe, tokenizer, run)  # type: ignore[arg-type]
                sft.train_sft(recipe, stage.data, session)  # type: ignore[arg-type]
        return stage

    return run_stage
