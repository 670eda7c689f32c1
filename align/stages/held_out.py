"""What a stage asks of the policy besides training it: evaluation, agreement, and whether all of it is being trained."""

import traceback
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from align.data.cards import DataCard
from align.data.entries import Notes, encode_rows, evaluated
from align.data.loader import first, load_split, refuse_one_file
from align.data.types import Example, SplitName
from align.errors import RayDiedError, UserError
from align.evaluate import hooks
from align.evaluate.accuracy import Evaluation, evaluate, short_problems
from align.evaluate.agreement import AgreementGate, Disagreement, probe
from align.evaluate.attribution import attributed
from align.evaluate.hooks import EvaluationError, Metrics, PolicyCheckpoint
from align.evaluate.rates import count_instructions, instruction_rates, task_rates, values_of, win_rate
from align.experience import Problem, encode_problems
from align.learner.group import LearnerGroup
from align.learner.objective import Sums
from align.recipe import AgreementOptions, DataOptions, EvaluationOptions, ModelOptions, PolicyRecipe
from align.recipe.pipeline import FIRST
from align.report.habits import last_evaluation_habits
from align.run import RunDirectory, read_jsonl, read_samples
from align.run.files import read_parquet
from align.session.checks import check_columns
from align.session.run import recorded_evaluations
from align.session.session import Session
from align.stages.guards import Alarm, habit_alarms, stop_at
from reward import RewardTerm, Verdict
from rollout import Prompt, RolloutError

PROBE_PROMPTS = 8


@dataclass(frozen=True, slots=True)
class Problems:
    """Held-out problems, and a few of their prompts to compare sampler and learner on.

    `watched` are those of the validation split, by which checkpoints are chosen; empty where the recipe evaluates on them
    anyway, or chooses none. `cards` are those of the data that they come from; `prompts` has the hash of every prompt of the splits that
    these are of, by "CARD/SPLIT"; `too_long` of the problems have a prompt that leaves no room for an answer.
    """

    problems: Sequence[Problem]
    probe: Sequence[Prompt]
    cards: Sequence[DataCard] = ()
    watched: Sequence[Problem] = ()
    prompts: Mapping[str, frozenset[int]] = field(default_factory=dict)
    too_long: int = 0

    @property
    def domains(self) -> list[str]:
        return list(dict.fromkeys(problem.example.domain for problem in self.problems))


def load_problems(
    options: EvaluationOptions,
    data: Sequence[DataOptions],
    rewards: Sequence[RewardTerm],
    max_length: int,
    tokenizer: Any,
    notes: Notes,
) -> Problems:
    """The problems that a run on these data evaluates on, whose prompts and answers have at most `max_length` tokens.

    What is left out goes into `notes`. Raises UserError for those that cannot be used, and where every prompt is too long.
    """

    def encode(example: Example) -> list[Problem]:
        return encode_problems(tokenizer, [example])

    entries = evaluated(options, data)
    found: dict[SplitName, list[Problem]] = {options.split: []}
    if options.every is not None:
        found.setdefault("validation", [])
    prompts: dict[str, frozenset[int]] = {}
    for split, encoded in found.items():
        for entry in entries:
            card = entry.card
            if split != options.split and split not in card.splits:
                continue
            refuse_one_file(card, entry.path, list(found))
            loaded = load_split(card, split, path=entry.path, levels=options.levels, demanded=split == options.split)
            asked = first(loaded.examples, options.limit, 0)
            encoded += encode_rows(asked, encode, entry, f"{entry.called}, split {split}", notes)
            prompts[f"{card.name}{entry.mark}/{split}"] = loaded.prompts
    longest = max_length - options.max_new_tokens
    problems = found.pop(options.split)
    watched = [problem for encoded in found.values() for problem in encoded]
    fitting = [problem.prompt for problem in short_problems(problems, longest)]
    short_problems(watched, longest)
    check_columns(rewards, [problem.example for problem in [*problems, *watched]])
    too_long = sum(len(problem.prompt.token_ids) > longest for problem in [*problems, *watched])
    probed = fitting[:: max(1, len(fitting) // PROBE_PROMPTS)][:PROBE_PROMPTS]
    return Problems(problems, probed, [entry.card for entry in entries], watched, prompts, too_long)


class HeldOut:
    """What a stage asks of its policy beside training it: evaluations, agreement of sampler and learner, hooks."""

    def __init__(self, recipe: PolicyRecipe, problems: Problems, session: Session):
        self._stage, self._options, self._seed = recipe.stage, recipe.evaluation, recipe.seed
        run = session.run
        self._problems, self._session, self._run = problems, session, run
        self._alarms = recipe.alarms
        self._after_sft = getattr(recipe, "init_from", None) is not None
        self._split = ""
        self._longest = recipe.rollout.max_length - recipe.evaluation.max_new_tokens
        self._others = answers_of(recipe.evaluation.against.run) if recipe.evaluation.against else []
        if against := recipe.evaluation.against:
            check_comparable(problems.problems, self._others, against.run, against.judge)
        self._max_length = recipe.rollout.max_length
        self._start = None if recipe.model.init == "random" else recipe.model.path
        if problems.too_long:
            run.warn(
                f"{problems.too_long} of {len(problems.problems) + len(problems.watched)} evaluation prompts have more than the "
                f"{self._longest} tokens that rollout.max_length leaves beside evaluation.max_new_tokens: they are not asked, and count "
                "as not right",
                too_long=problems.too_long,
            )
        dtype, precision = session.policy.dtype, recipe.weights.precision
        self.gate = AgreementGate(recipe.agreement, dtype, run.warn, precision)
        self._rounds = precision != "model"
        self._probe_gate = AgreementGate(AgreementOptions(), dtype, run.warn) if self._rounds else self.gate

    def on_validation(self) -> "HeldOut":
        """The same questions, asked of the problems by which checkpoints are chosen."""
        chosen = copy(self)
        if self._problems.watched:
            chosen._problems, chosen._split = replace(self._problems, problems=self._problems.watched), "validation"
        return chosen

    def was_asked_before(self) -> bool:
        """Whether the stage of `init_from` has ended by asking its policy all of these problems, and had the answers scored where there are rewards:
        then nothing is gained by asking it again."""
        table = RunDirectory(self._run.directory.path / FIRST).evaluations_directory / "after SFT.parquet"
        if not (self._after_sft and table.exists()):
            return False
        rows = read_parquet(table, ["id", "prompt", "verdict"]).to_pylist()
        told = [row for row in rows if not self._session.pool or row["verdict"] != Verdict.UNSCORED]
        return asked_of(self._problems.problems) <= {(row["id"], row["prompt"]) for row in told}

    def evaluate_start(self, name: str, done: int) -> dict[str, Evaluation]:
        """Evaluate the policy that the stage began with, which the rollout workers hold unless steps are `done`: nothing where it was not
        evaluated before these."""
        if done and name not in recorded_evaluations(self._run.directory, self._problems.domains):
            self._run.warn(
                f"evaluation.before: {done} steps are done, and the policy before them can no longer be evaluated"
            )
            return {}
        return {name: self.evaluate(name, 0)}

    def evaluate(self, name: str, step: int) -> Evaluation:
        """Answer the held-out problems with the weights that the rollout workers hold, and record the result.

        What an interrupted run has measured already is not measured again.
        """
        name = f"{name}, {self._split}" if self._split else name
        before = recorded_evaluations(self._run.directory, self._problems.domains)
        if name in before:
            if told := last_evaluation_habits(self._run.directory.path, name):
                self._stop_after_steps((alarm for _, alarm in habit_alarms(told.found, self._alarms)), step)
            return before[name]
        self._run.progress.phase(f"evaluating ({name})")
        problems = self._problems.problems
        evaluation = evaluate(
            self._session.fleet,
            self._session.tokenizer,
            problems,
            self._session.pool,
            samples=self._options.samples if self._session.pool else 0,
            max_new_tokens=self._options.max_new_tokens,
            longest=self._longest,
            seed=self._seed,
        )
        examples = [problem.example for problem in problems]
        evaluation = replace(evaluation, rows=count_instructions(evaluation.rows, examples))
        evaluation = replace(evaluation, rates=self._rates(evaluation, examples))
        self._run.record_evaluation(self._stage, step, name, evaluation, self._split)
        self._tell_habits(name, step)
        return evaluation

    def _tell_habits(self, name: str, step: int) -> None:
        """Say what the answers of an evaluation took up or lost against the first one, and which of it is an alarm.

        Raises AlarmError for an alarm of `alarms.stop` after the steps of SFT and DPO, whose evaluations alone have answers. In GRPO the steps are
        watched; its evaluations may show what the SFT stage before has taught.
        """
        told = last_evaluation_habits(self._run.directory.path, name)
        if told is None or not told.found.sentences:
            return
        alarms = {alarm.message: alarm for _, alarm in habit_alarms(told.found, self._alarms)}
        examples = {habit.sentence: habit.examples for habit in told.found.habits}
        lines = [f"{name}: habits, against {told.against}:"]
        for sentence in told.found.sentences:
            lines += [f"  {'warning: ' if sentence in alarms else ''}{sentence}"]
            lines += [f"      {example}" for example in examples.get(sentence, ())]
        facts = [{"sentence": sentence, "examples": list(its)} for sentence, its in examples.items()]
        self._run.tell("habits", "\n".join(lines), evaluation=name, habits=facts)
        for message, alarm in alarms.items():
            self._run.metrics.event("warning", f"{name}: {message}", alarm=alarm.kind, examples=list(alarm.samples))
        self._stop_after_steps(alarms.values(), step)

    def _stop_after_steps(self, alarms: Iterable[Alarm], step: int) -> None:
        """Raise AlarmError for an alarm of `alarms.stop` where these are of an evaluation after the steps of a stage that samples nothing itself."""
        if self._stage != "grpo" and step:
            stop_at(alarms, self._alarms, self._run.directory.path)

    def _rates(self, evaluation: Evaluation, examples: Sequence[Example]) -> dict[str, float]:
        """What the tasks count of the greedy answers, what instructions these follow, and how often they are better than
        another run's; and how often the sampled ones are."""
        greedy = [answer for answer in evaluation.rows if answer["greedy"]]
        rates = task_rates(self._problems.cards, greedy, examples) | instruction_rates(greedy)
        if (against := self._options.against) is not None and not self._split:
            for name, is_greedy in (("win_rate", True), ("win_rate_sampled", False)):
                ours, theirs = (
                    [answer for answer in answers if answer["greedy"] is is_greedy]
                    for answers in (evaluation.rows, self._others)
                )
                if is_greedy or (ours and theirs):
                    rates[name] = win_rate(ours, theirs, reward=against.judge)
        return rates

    def check_agreement(self, learner: LearnerGroup, when: str) -> Disagreement:
        """Probe sampler and learner on fixed prompts. Raises AgreementError beyond the recipe's limit."""
        found = self._probe(learner, when)
        self._run.progress.note(f"agreement {when}: {found}")
        return found

    def check_sync(self, learner: LearnerGroup, when: str) -> dict[str, float]:
        """Probe whether rounded weights arrived, which a step's limit is too wide to tell. Returns metrics; none where weights are not rounded.

        Raises AgreementError.
        """
        if not self._rounds:
            return {}
        found = self._probe(learner, f"{when}, after the weight sync")
        return {"sync/mean": found.mean, "sync/max": found.largest, "sync/k3": found.k3}

    def _probe(self, learner: LearnerGroup, when: str) -> Disagreement:
        """Compare both on fixed prompts. Where weights are rounded the learner's are too, and the limit is that of the dtype alone."""
        when = f"{when}, both with rounded weights" if self._rounds else when
        with self._attributed(learner):
            return self._probe_gate.check(probe(self._session.fleet, learner, self._problems.probe), when)

    def check_update(self, learner: LearnerGroup, sums: Sums, when: str) -> None:
        """Compare what was sampled with what the learner has just computed for it. Raises AgreementError beyond the recipe's limit."""
        with self._attributed(learner):
            self.gate.check(Disagreement.of(sums), when)

    def _attributed(self, learner: LearnerGroup) -> AbstractContextManager[None]:
        return attributed(self._session.fleet, learner, self._problems.probe, self.gate.dtype)

    def run_hooks(self, checkpoint: ModelOptions, step: int) -> None:
        """Run the recipe's evaluation hooks on what the stage wrote, of which the rollout workers hold the weights."""
        subject = PolicyCheckpoint(checkpoint, self._session.tokenizer, self._max_length, self._start)
        for hook in self._options.hooks:
            name = hook.title
            self._run.progress.phase(f"evaluating ({name})")
            try:
                metrics = hooks.run(hook.name, subject, self._session.fleet, hook.params)
                self._record(step, name, metrics)
            except (RolloutError, RayDiedError):
                raise
            except Exception as error:
                # The policy is trained: what cannot be measured on it is no reason to call that failed, nor to leave out other hooks.
                self._run.stop.check()
                why = str(error)
                if not isinstance(error, EvaluationError | UserError):
                    file = self._run.directory.save_stacks(traceback.format_exc())
                    why = f"{type(error).__name__}: {error} (its traceback is in {file} of the run)"
                metrics = Metrics({}, not_run={"all of it": why})
                self._record(step, name, metrics)
            if hook.name == "drift" and metrics.values.get("difference", 0.0) >= self._alarms.drift:
                moved = f"{metrics.values['difference']:.2f} nats a token"
                self._run.warn(f"{name}: the policy has moved {moved} from the model that it began with", alarm="drift")
            for part, why in metrics.not_run.items():
                self._run.warn(f"{name}: {part} was not run: {why}")
            shown = ", ".join(f"{key} {value:.4g}" for key, value in list(metrics.values.items())[:6])
            self._run.progress.note(f"{name}: {shown or 'nothing measured'}")

    def _record(self, step: int, name: str, metrics: Metrics) -> None:
        facts = {"not_run": dict(metrics.not_run)} if metrics.not_run else None
        prefix = f"evaluation/{name}"
        self._run.record_numbers(self._stage, step, name, metrics.values, metrics.rows, facts, prefix=prefix)


def asked_of(problems: Sequence[Problem]) -> set[tuple[str, str]]:
    """What problems are known by: their ids, and what they ask."""
    return {(problem.example.id, problem.example.prompt_text) for problem in problems}


def check_comparable(problems: Sequence[Problem], others: Sequence[Mapping[str, Any]], run: Path, judge: str) -> None:
    """Raise UserError where the answers of another run are to none of the problems, by id and text, or none of the greedy ones has a value of `judge`."""
    asked = asked_of(problems)
    shared = [row for row in others if (row["id"], row["prompt"]) in asked]
    if not shared:
        raise UserError(
            f"evaluation.against.run: the answers of {run} are to none of the prompts that are evaluated here, by id and text. Cure: evaluate the same "
            "file or cards in both, with the same instruction"
        )
    greedy = [row for row in shared if row["greedy"]]
    if not values_of(greedy, judge):
        names = dict.fromkeys(name for row in greedy for name in row["components"])
        known = ", ".join(name for name in names if values_of(greedy, name))
        raise UserError(
            f"evaluation.against.judge: {run} scored none of its answers to these prompts by a reward called {judge!r}; it did by {known or 'none'}. "
            "Cure: name one of its rewards that this recipe has too, or evaluate that run again with this one"
        )


def answers_of(run: Path) -> list[dict[str, Any]]:
    """The answers of a run's last evaluation. Raises UserError where it has none."""
    directory = RunDirectory(run if (run / "evaluations.jsonl").exists() else run.parent)
    if directory.evaluations_file.exists():
        for record in reversed(read_jsonl(directory.evaluations_file)):
            file = directory.evaluations_directory / f"{record['name']}.parquet"
            if "accuracy" in record and "problems" in record and "split" not in record and file.exists():
                return read_samples(file)
    raise UserError(
        f"evaluation.against.run: {run} has no evaluation of problems with answers to compare with. Cure: name a run that ended with one"
    )
