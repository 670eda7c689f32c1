"""The steps of a stage that trains: where they begin, when a checkpoint of them is written, and that it is of the same run."""

import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import yaml

from align.data.drawing import Source
from align.errors import AlarmError, RayDiedError, UserError
from align.evaluate.agreement import AgreementError
from align.learner.batch import PolicyPair, TrainingSequence
from align.learner.group import LearnerError, RankGroup
from align.learner.objective import learning_rate
from align.model.policy import first_line
from align.recipe import ModelOptions, OptimizerOptions, TrainingRecipe, dump_recipe
from align.recipe.roles import reward_models
from align.report.model_card import is_edited
from align.run import write_atomically
from align.run.checkpoints import Checkpoint, Entry, hash_files
from align.session.run import Run, positions
from reward import RewardError
from rollout import RolloutError

MODEL = "model"
BAD_UPDATES = "bad_updates"
BEST = "best"
SAMPLED_BYTES = 2**20
FAILURES = 3
COMPARED = {
    "data": "the training data",
    "reference": "the weights of the reference",
    "teacher": "the weights of the teacher (grpo.distill)",
    "base": "the weights of what is not trained",
    "reward models": "the weights of reward models among the rewards",
}
CENSUS_STEP = 10
"""After so many steps every parameter should have had a gradient."""


class SavingError(Exception):
    """Checkpoint after checkpoint could not be written."""


UNSURE = (LearnerError, AgreementError, RayDiedError, SavingError)
"""What leaves no learner to save, one that is not what was sampled from, or no place for it."""


class Steps:
    """The steps that are still to be made, as numbers from 0; ends the learner when the block ends.

    A checkpoint is written every `save_every` steps, after the last one, after the best one so far, when the run is told to stop (then the step
    that is being made ends first, where `run.grace_s` allows), and when an alarm or something other than the learner ends it. `state` is what the stage itself has to
    remember, ready for JSON.
    """

    def __init__(
        self,
        recipe: TrainingRecipe,
        run: Run,
        learner: RankGroup,
        total: int,
        data: Sequence[Source[Any]],
        *,
        base: ModelOptions | None = None,
        reference: ModelOptions | None = None,
        teacher: ModelOptions | None = None,
        state: dict[str, Any] | None = None,
    ):
        """`base` is the model whose frozen parameters checkpoints do not hold: that which adapters are trained on."""
        self._recipe, self._run, self._learner, self._total = recipe, run, learner, total
        self._identity = {
            "learner.ranks": recipe.learner.ranks,
            "learner.zero_stage": recipe.learner.zero_stage,
            "learner.expert_parallel": recipe.learner.expert_parallel,
            "data": {source.card: source.digest or data_digest(source.items) for source in data},
            "reference": None if reference is None else weights_digest(reference.path),
            "teacher": None if teacher is None else weights_digest(teacher.path),
            "base": None if base is None else weights_digest(base.path),
            "reward models": {path: weights_digest(path) for path in reward_models(recipe.roles().rewards)} or None,
        }
        self.done = run.resume.step if run.resume else 0
        self.state = (state or {}) | (dict(run.resume.facts["state"]) if run.resume else {})
        self._saved, self._failures, self._between, self._updates = self.done, 0, False, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is not None and self._is_whole(kind) and self.done > self._saved:
                self._save()
        except (LearnerError, RolloutError) as error:
            self._run.warn(f"the checkpoint of step {self.done} could not be written: {first_line(error)}")
        finally:
            self._learner.close()

    def _is_whole(self, kind: type[BaseException]) -> bool:
        """Whether what ends the run leaves the learner as it was after `done` steps."""
        if issubclass(kind, UNSURE) or not self._learner.is_idle:
            return False
        if issubclass(kind, KeyboardInterrupt):
            return self._between  # in a step no time is left: the step had it
        updated = self._learner.updates > self._updates
        if not self._between and (issubclass(kind, AlarmError) or (updated and issubclass(kind, RewardError))):
            # Evaluations and alarms are the last things of a step, so that this one is done.
            self.done, self._between = self.done + 1, True
        return self._between or not updated

    def restore(self) -> None:
        """Give the learner, which must be ready, the state to go on from. Raises UserError where it is of another run."""
        if self._run.resume is not None:
            self._check_identity(self._run.resume)
            self._learner.load_state(self._run.resume.path)
            self._learner.bad_updates = self.state.get(BAD_UPDATES, 0)
        self._between = True

    def tell_length(self) -> None:
        """Where the run was shorter when its checkpoint was written, say what its learning rate does from here on."""
        if self._run.resume is None or self.done >= self._total:
            return
        before = yaml.safe_load(self._run.resume.facts["recipe"])
        if (length := before[self._recipe.stage]["steps"]) == self._total:
            return
        optimizer = self._recipe.learner.optimizer
        last = learning_rate(self.done - 1, length, OptimizerOptions(**before["learner"]["optimizer"]))
        now = learning_rate(self.done, self._total, optimizer)
        rate = (
            f"stays {now:.3g}" if now == last else f"goes from {last:.3g} in step {self.done} to {now:.3g} in the next"
        )
        self._run.tell(
            "longer",
            f"the run now has {self._total} steps in place of {length}: from here on the learning rate is that of a run of "
            f"{self._total} steps (schedule: {optimizer.schedule}), so it {rate}",
            step=self.done,
        )

    def note_accuracy(self, step: int, accuracy: float) -> None:
        """Tell how good the policy is after the step that is being made: the checkpoint of the best one stays."""
        if accuracy > self.state.get(BEST, {"accuracy": -1.0})["accuracy"]:
            self.state[BEST] = {"step": step, "accuracy": accuracy}

    def __iter__(self) -> Iterator[int]:
        for step in range(self.done, self._total):
            with self._run.stop.deferred():
                self._between, self._updates = False, self._learner.updates
                yield step
                self.done, self._between = step + 1, True
                every = self._recipe.save_every
                is_due = self.done == self._best or (every and (self.done % every == 0 or self.done == self._total))
                if self._run.stop.asked or is_due:
                    self._save()
            self._run.stop.check()

    def check_gradients(self, steps: int) -> None:
        """Warn of parameters that have had no gradient in the first `steps`; an expert among them is not being trained."""
        if missing := self._learner.missing_gradients():
            shown = ", ".join(missing[:4]) + (", ..." if len(missing) > 4 else "")
            self._run.warn(
                f"{len(missing)} trainable parameters or experts have had no gradient in {steps} steps: {shown}"
            )

    def save_final(self, start: ModelOptions) -> ModelOptions:
        """Write what was trained from `start` to `final/`, and say how much of an adapter is lost where it is merged.

        A model card that somebody has edited there stays. Returns the trained model.
        """
        card = self._run.directory.final_directory / "README.md"
        edited = card.read_text(encoding="utf-8") if card.exists() and is_edited(card) else None
        lost = self._learner.save(self._run.directory.final_directory)
        if edited is not None:
            write_atomically(card, edited)
            self._run.warn(
                f"{card} is that of the model before, since it was edited; `align publish --new-card` writes a new one"
            )
        if lost is not None:
            self._run.progress.note(
                f"final: in the merged weights, in {self._recipe.model.dtype}, {lost:.2%} of what the adapter does is rounded away; "
                "final/adapter is exact"
            )
        return start.model_copy(update={"path": str(self._run.directory.final_directory)})

    @property
    def _best(self) -> int | None:
        best: int | None = self.state.get(BEST, {}).get("step")
        return best

    def _save(self) -> None:
        facts = {
            "stage": self._recipe.stage,
            "recipe": dump_recipe(self._recipe),
            "identity": self._identity,
            "positions": positions(self._run.directory),
            "state": self.state | {BAD_UPDATES: self._learner.bad_updates},
        }
        try:
            self._run.checkpoints.write(self.done, facts, self._fill, best=self._best)
        except OSError as error:
            self._failures += 1
            there = f"; the one of step {self._saved} is still there" if self._saved else ""
            self._run.warn(f"the checkpoint of step {self.done} could not be written ({error}){there}")
            if self._failures == FAILURES:
                raise SavingError(
                    f"{FAILURES} checkpoints in a row could not be written, the last because of: {error}. Free some space or "
                    f"mend {self._run.directory.checkpoints_directory}; the same command then goes on from step {self._saved}"
                ) from None
        else:
            self._saved, self._failures = self.done, 0
            self._run.directory.note_checkpoint(self.done)

    def _fill(self, directory: Path) -> Mapping[str, Entry]:
        entries = self._learner.save_state(directory)
        self._learner.save(directory / MODEL)
        return entries | hash_files(directory, MODEL)

    def _check_identity(self, checkpoint: Checkpoint) -> None:
        before = checkpoint.facts["identity"]
        for key in ("learner.ranks", "learner.zero_stage", "learner.expert_parallel"):
            if before[key] != self._identity[key]:
                raise UserError(
                    f"{key} is {self._identity[key]}, and checkpoint {checkpoint.path} was written with {before[key]}: its "
                    "parts fit no other division; go on with the same, or start again with run.overwrite=true"
                )
        for key, what in COMPARED.items():
            if key not in before:
                if self._identity[key] is not None:
                    self._run.warn(
                        f"checkpoint {checkpoint.path} is of an earlier version: {what} could not be compared"
                    )
            elif compared(key, before[key]) != compared(key, self._identity[key]):
                told = f"{what} are not what they were when checkpoint {checkpoint.path} was written"
                if not self._recipe.run.allow_changes:
                    raise UserError(f"{told}: put them back, or go on nevertheless with run.allow_changes=true")
                self._run.warn(told)


def compared(key: str, identity: Any) -> Any:
    """What counts of the part `key` of an identity: of reward models, which are in it by their paths, the weights, for a pipeline may be moved."""
    return sorted(identity.values()) if key == "reward models" and identity else identity


def data_digest(items: Sequence[Any]) -> str:
    """A hash of all that a stage trains on, in its order."""
    digest = hashlib.sha256()
    with np.printoptions(threshold=sys.maxsize):
        for item in items:
            for rest in item.both if isinstance(item, PolicyPair) else [item]:
                if isinstance(rest, TrainingSequence):
                    # As numbers: their text takes minutes where conversations are long.
                    digest.update(np.array(rest.token_ids, dtype=np.int64).tobytes() + rest.sampled.tobytes())
                    rest = replace(rest, token_ids=[], sampled=rest.sampled[:0])
                digest.update(repr(rest).encode())
    return digest.hexdigest()


def weights_digest(path: str) -> str:
    """A hash by which the weights in a directory are told from others: their files' sizes, beginnings and ends."""
    digest = hashlib.sha256(path.encode() if not Path(path).is_dir() else b"")
    for file in sorted(Path(path).glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as opened:
            digest.update(opened.read(SAMPLED_BYTES))
            opened.seek(max(0, size - SAMPLED_BYTES))
            digest.update(opened.read(SAMPLED_BYTES))
    return digest.hexdigest()
