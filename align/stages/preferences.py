"""Preference data from the policy itself: pairs of its own answers to a prompt, the better one known by its verdict.

The DeepSeek-V2 report (arXiv 2405.04434, section 4.2) gathers them so: for code by compiler feedback, for mathematics by
the ground truth.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from align.data.tables import refuse_one_file
from align.data.types import Example, SplitName
from align.errors import UserError
from align.evaluate.problems import Answer, encode_prompts, gather_answers, submit_groups
from align.recipe import PreferencesRecipe
from align.run import write_jsonl
from align.session.engines import Engines
from align.session.run import Run
from align.stages.examples import Room, entries_of, load_examples, short_enough
from rollout import Prompt

SHOWN = ("prompts", "accuracy", "pairs")


@dataclass(frozen=True, slots=True)
class SplitPrompts:
    """The prompts of one split of one data card."""

    split: SplitName
    examples: Sequence[Example]
    prompts: Sequence[Prompt]


def load_prompts(recipe: PreferencesRecipe, tokenizer: Any, run: Run) -> list[SplitPrompts]:
    """The prompts of every split of the recipe's cards that are short enough. Raises UserError for what cannot be used."""
    options = recipe.preferences
    longest = recipe.rollout.max_length - recipe.sampling.max_new_tokens
    room = Room(longest, "what rollout.max_length leaves beside sampling.max_new_tokens")
    found = []
    for entry in entries_of(recipe):
        refuse_one_file(entry.card, entry.data.path, list(entry.card.splits))
        for split in entry.card.splits:
            limit = (entry.data.limit or options.prompts) if split == "train" else options.held_out_prompts
            examples = load_examples(recipe, entry, split, limit=limit).examples
            encoded = list(zip(examples, encode_prompts(tokenizer, examples), strict=True))
            kept = short_enough(encoded, [len(prompt.token_ids) for _, prompt in encoded], room, entry, split, run)
            found.append(SplitPrompts(split, [example for example, _ in kept], [prompt for _, prompt in kept]))
    return found


def gather_preferences(recipe: PreferencesRecipe, prompts: Sequence[SplitPrompts], engines: Engines, run: Run) -> None:
    """Sample, judge and pair; writes `final/DOMAIN/SPLIT.jsonl`. Raises UserError where no prompt gave a pair."""
    run.progress.stage("preferences", len(prompts))
    run.progress.phase("starting rollout workers")
    engines.fleet.wait_until_ready()
    pairs: dict[tuple[str, SplitName], list[dict[str, Any]]] = {}
    for step, part in enumerate(prompts):
        by_id = {example.id: example for example in part.examples}
        run.progress.phase(f"sampling ({part.split} split of {part.examples[0].domain})")
        groups = engines.fleet.generate(
            part.prompts, recipe.preferences.samples, recipe.sampling, seed=recipe.seed, step=step
        )
        answers = gather_answers(submit_groups(groups, by_id, engines.tokenizer, engines.judges), by_id, engines.judges)
        own = defaultdict(list)
        for answer in answers:
            own[answer.completion.prompt_id].append(answer)
        for example in part.examples:
            pairs.setdefault((example.domain, part.split), []).extend(pairs_of(example, own[example.id], recipe))
        right = [answer.right for answer in answers]
        found = sum(len(rows) for rows in pairs.values())
        run.record_step(
            "preferences",
            step + 1,
            {"prompts": len(part.prompts), "accuracy": sum(right) / len(right), "pairs": found},
            SHOWN,
        )
    for (domain, split), rows in pairs.items():
        if not rows:
            raise UserError(
                f"no {split} prompt of domain {domain} had both right and wrong answers: raise preferences.samples or "
                "preferences.prompts, or take prompts that the policy finds neither too easy nor too hard"
            )
        directory = run.directory.final_directory / domain
        directory.mkdir(parents=True, exist_ok=True)
        write_jsonl(directory / f"{split}.jsonl", rows)
        run.progress.note(f"{len(rows)} pairs of the {split} split of {domain} are in {directory}")


def pairs_of(example: Example, answers: Sequence[Answer], recipe: PreferencesRecipe) -> Iterator[dict[str, Any]]:
    """Right answers beside wrong ones, as many pairs as the recipe takes of a prompt; every text comes once."""
    judged = [answer for answer in answers if answer.reward.value is not None]
    right = list(dict.fromkeys(answer.text for answer in judged if answer.right))
    wrong = list(dict.fromkeys(answer.text for answer in judged if not answer.right))
    draw = Random(f"{recipe.seed}/{example.id}")
    draw.shuffle(right)
    draw.shuffle(wrong)
    for place, (chosen, rejected) in enumerate(zip(right, wrong, strict=False)):
        if place == recipe.preferences.pairs_per_prompt:
            return
        yield {
            "id": f"{example.id}/{place}",
            "messages": [dict(message) for message in example.messages],
            "chosen": chosen,
            "rejected": rejected,
            "domain": example.domain,
        }
