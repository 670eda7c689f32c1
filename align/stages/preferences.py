"""Preference data from the policy itself: pairs of its own answers to a prompt, the better one known by its verdict.

The DeepSeek-V2 report (arXiv 2405.04434, section 4.2) gathers them so: for code by compiler feedback, for mathematics by
the ground truth.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from align.data.entries import Notes, entries_of
from align.data.loader import refuse_one_file
from align.data.types import SplitName
from align.errors import UserError
from align.evaluate.accuracy import mean_of
from align.experience import Problem, ScoredGroup, ScoredTrajectory, gather, reader_of_prompts, submit
from align.recipe import PreferencesRecipe
from align.run import write_jsonl
from align.session.checks import check_columns
from align.session.session import Session

SHOWN = ("prompts", "accuracy", "pairs")


@dataclass(frozen=True, slots=True)
class SplitPrompts:
    """The prompts of one split of one data card."""

    split: SplitName
    problems: Sequence[Problem]


def load_prompts(recipe: PreferencesRecipe, tokenizer: Any, notes: Notes) -> list[SplitPrompts]:
    """The prompts of every split of the recipe's cards that are short enough. Raises UserError for what cannot be used."""
    options, reader = recipe.preferences, reader_of_prompts(recipe, tokenizer, notes)
    found = []
    for entry in entries_of(recipe.data, recipe.data_stage):
        refuse_one_file(entry.card, entry.path, list(entry.card.splits))
        for split in entry.card.splits:
            limit = (entry.data.limit or options.prompts) if split == "train" else options.held_out_prompts
            found.append(SplitPrompts(split, reader.read(entry, split, limit)[0]))
    examples = [problem.example for each in found for problem in each.problems]
    if with_tools := next((example.id for example in examples if example.tools), None):
        raise UserError(f"prompt {with_tools!r} has tools, and pairs have no place for them: take prompts without")
    check_columns(recipe.rewards, examples)
    return found


def gather_preferences(recipe: PreferencesRecipe, splits: Sequence[SplitPrompts], session: Session) -> None:
    """Sample, judge and pair; writes `final/DOMAIN/SPLIT.jsonl`. Raises UserError where no prompt gave a pair."""
    run = session.run
    run.progress.stage("preferences", len(splits))
    run.progress.phase("starting rollout workers")
    session.fleet.wait_until_ready()
    pairs: dict[tuple[str, SplitName], list[dict[str, Any]]] = {}
    cut_off = 0
    for step, part in enumerate(splits):
        run.progress.phase(f"sampling ({part.split} split of {part.problems[0].example.domain})")
        prompts = [problem.prompt for problem in part.problems]
        drawn = session.fleet.sample(prompts, recipe.preferences.samples, recipe.sampling, seed=recipe.seed, step=step)
        submitted = submit(drawn, part.problems, session.tokenizer, session.pool)
        groups = gather(submitted, part.problems, session.pool, alone=True)
        found = 0
        for group in groups:
            its = list(pairs_of(group, recipe.preferences.pairs_per_prompt, recipe.seed))
            pairs.setdefault((group.problem.example.domain, part.split), []).extend(its)
            found += len(its)
        answers = judged(groups)
        lost = sum(answer.right and answer.truncated for answer in answers)
        cut_off += lost
        run.record_step(
            "preferences",
            step + 1,
            {
                "prompts": len(prompts),
                "accuracy": mean_of([a.right for a in answers]),
                "pairs": found,
                "right_but_cut_off": lost,
            },
            SHOWN,
        )
    write_pairs(pairs, run.directory.final_directory, run.progress.note, cut_off)


def write_pairs(
    pairs: Mapping[tuple[str, SplitName], Sequence[Mapping[str, Any]]],
    directory: Path,
    note: Callable[[str], None],
    cut_off: int = 0,
) -> None:
    """Write the pairs of each domain and split. Raises UserError, when all others are written, for those that have none; `cut_off` right answers are in
    none."""
    for (domain, split), rows in pairs.items():
        if rows:
            (directory / domain).mkdir(parents=True, exist_ok=True)
            write_jsonl(directory / domain / f"{split}.jsonl", rows)
            note(f"{len(rows)} pairs of the {split} split of {domain} are in {directory / domain}")
    if without := [f"{split} prompt of domain {domain}" for (domain, split), rows in pairs.items() if not rows]:
        too_short = (
            f"{cut_off} right answers were cut off, and are in no pair: raise sampling.max_new_tokens; or "
            if cut_off
            else ""
        )
        raise UserError(
            f"no {' and no '.join(without)} had both right and wrong answers by the verdict of the first reward: {too_short}raise preferences.samples, preferences.prompts or "
            "preferences.held_out_prompts, or take prompts that the policy finds neither too easy nor too hard"
        )


def judged(groups: Sequence[ScoredGroup]) -> list[ScoredTrajectory]:
    """The answers with a verdict. Raises UserError where there is none, of which no pairs can be made."""
    answers = [answer for group in groups for answer in group.trajectories]
    found = [answer for answer in answers if answer.scored]
    if answers and not found:
        details = (score.detail for answer in answers for score in answer.reward.components.values())
        raise UserError(
            f"none of {len(answers)} answers could be judged: {next(filter(None, details), 'the rewards do not say why')}"
        )
    return found


def pairs_of(group: ScoredGroup, most: int, seed: int) -> Iterator[dict[str, Any]]:
    """Right answers beside wrong ones, `most` pairs at most; every text comes once, and none that is empty or was found both right and wrong. A right
    one that was cut off is in no pair: whoever learns from it would learn to end there."""
    example = group.problem.example
    scored = [answer for answer in group.trajectories if answer.scored and answer.reward.value is not None]
    found = {
        right: dict.fromkeys(a.text for a in scored if a.right is right and a.text.strip()) for right in (True, False)
    }
    right, wrong = ([text for text in found[one] if text not in found[not one]] for one in (True, False))
    ended = {answer.text for answer in scored if not answer.truncated}
    right = [text for text in right if text in ended]
    draw = Random(f"{seed}/{example.id}")
    draw.shuffle(right)
    draw.shuffle(wrong)
    for place, (chosen, rejected) in enumerate(zip(right[:most], wrong, strict=False)):
        yield {
            "id": f"{example.id}/{place}",
            "messages": [dict(message) for message in example.messages],
            "chosen": chosen,
            "rejected": rejected,
            "domain": example.domain,
        }
