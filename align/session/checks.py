"""Everything that can be known to be wrong before a run begins, without an engine and without reading a whole data file.

`align check` and the run itself go through the same list.
"""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from glob import glob
from itertools import product
from pathlib import Path
from typing import Any

import torch

from align.data.cards import DataCard, Stage, require_stage
from align.data.entries import Entry, card_of, evaluated
from align.data.loader import domains_of
from align.data.types import Example, SplitName
from align.errors import UserError, check_installed, naming, nearest, reward_errors
from align.evaluate import hooks
from align.evaluate.doctor import FAILED, check_checkpoint, examine, positions_of, short_positions, verdict
from align.learner.balance import factors_of
from align.learner.experts import check_spreadable
from align.model.lora import adapted_names, left_out, parts_of
from align.model.names import frozen_names
from align.model.policy import find_config, load_tokenizer
from align.model.reward_model import is_reward_model
from align.model.sizes import ModelSizes, model_sizes, read_config, sent_bytes, shapes_of, skeleton_of
from align.recipe import (
    AgreementOptions,
    DataOptions,
    GrpoRecipe,
    ModelOptions,
    PlannedStage,
    PolicyRecipe,
    Recipe,
    Replay,
    Roles,
    TrainingRecipe,
    check_model_directory,
)
from align.recipe.options import HUB_NAME
from align.recipe.presets import expansion, unclipped
from align.recipe.roles import take
from align.run import check_machine
from align.run.machine import check_port, memory_bytes, object_store_bytes, shared_memory_bytes
from align.run.trackers import check_trackers
from align.session.disk import bytes_needed, check_space
from align.session.ray import check_address
from reward import Mixture, RewardTerm
from reward.mixture import is_judged, share_a_domain
from reward.own import columns_of
from reward.own.file import prompt_hint
from rollout import FleetOptions, Precision
from rollout.processes import cluster_address

MADE_HERE = {"messages": None, "completion_tokens": None}
"""What `align.experience.reward_sample` adds to the columns of the data."""


def check(stages: Iterable[PlannedStage]) -> list[str]:
    """Look at all stages. Raises UserError, which names the file, for the first mistake; returns notes, such as what could not be looked at yet."""
    notes: list[str] = []
    for stage in stages:
        with naming(str(stage.file)):
            notes += [f"{stage.file}: {note}" for note in check_recipe(stage.recipe)]
    return list(dict.fromkeys(notes))


def check_rewards_ready(stages: Iterable[PlannedStage]) -> None:
    """Raise UserError for a reward that this machine could not use now, such as one whose server is down. In a cluster other machines use them."""
    if cluster_address():
        return
    for stage in stages:
        if rewards := stage.recipe.roles().rewards:
            with naming(f"{stage.file}: rewards"), reward_errors():
                Mixture(rewards).check_ready()


def check_reward_models(stages: Iterable[PlannedStage]) -> None:
    """Raise UserError for a reward model that is not there, before a run that no other stage makes it for. In a cluster other machines load it."""
    for stage in stages:
        if missing := missing_reward_models(stage.recipe.roles().rewards) if not cluster_address() else []:
            raise UserError(
                f"{stage.file}: rewards: {missing[0]} does not exist: name the final/ of a run of `align reward-model`"
            )


def missing_reward_models(rewards: Sequence[RewardTerm]) -> list[str]:
    """The component and path of reward models that are neither there nor names on the hub."""
    paths = [(term.component, str(term.params.get("path"))) for term in rewards if term.name == "reward_model"]
    return [f"{name}: {path}" for name, path in paths if not Path(path).exists() and not HUB_NAME.fullmatch(path)]


def check_recipe(recipe: Recipe) -> list[str]:
    """Look at one stage. Raises UserError for the first mistake; returns notes, such as what could not be looked at yet."""
    roles = recipe.roles()
    check_names(recipe.data, recipe.data_stage, roles)
    check_components(recipe)
    check_trackers(recipe.trackers)
    check_machine(cores=recipe.machine.cores, memory_gb=recipe.machine.memory_gb)
    for hook in roles.evaluation.hooks if roles.evaluation is not None else ():
        hooks.check_ready(hook.name, hook.params, roles.longest)
    if address := cluster_address():
        check_address(address, os.environ.get("RAY_AUTH_MODE"))
    else:  # a cluster may grow
        check_places(recipe, torch.cuda.device_count())
    if roles.learner is not None and roles.learner.port is not None and not address:
        check_port(roles.learner.port)
    notes: list[str] = []
    if isinstance(recipe, GrpoRecipe):
        notes += filter(None, [expansion(recipe.grpo) if recipe.grpo.preset else unclipped(recipe.grpo)])
    if isinstance(recipe, GrpoRecipe) and recipe.weights.precision != "model":
        notes.append(rounding_note(recipe.weights.precision, recipe.model.dtype, recipe.agreement))
    if roles.rollout is not None and roles.sampled_sequences:
        notes += idle_workers(roles.rollout, roles.sampled_sequences)
    notes += check_model(recipe)
    notes += [f"not looked at: {missing} is still to be made" for missing in missing_reward_models(roles.rewards)]
    # Last, so that a machine without engines can tell what else is wrong with a recipe.
    engines = {"ray": True, "vllm": roles.rollout is not None, "deepspeed": roles.learner is not None}
    check_installed([name for name, is_used in engines.items() if is_used])
    return notes


def idle_workers(rollout: FleetOptions, sequences: int) -> list[str]:
    """What to say of workers that get none of the engine batches in which so many sequences are sampled together."""
    batches = -(-sequences // rollout.batch_sequences)
    if batches >= rollout.workers:
        return []
    return [
        f"rollout.workers is {rollout.workers}, and the {sequences} sequences that are sampled at a time are {batches} engine "
        f"batch{'es' if batches > 1 else ''} of at most rollout.batch_sequences = {rollout.batch_sequences}: the other workers have nothing to sample. "
        f"Lower the one, or the other to {-(-sequences // rollout.workers)}"
    ]


def rounding_note(precision: Precision, dtype: str, given: AgreementOptions) -> str:
    """What rounded weights mean for a run that sends them."""
    return (
        f"weights.precision: workers sample, and answer evaluations, with weights rounded to {precision}, and the learner's are not rounded: a step "
        f"stops the run where they differ by {given.limits(precision)[1]:g} nats a token, and a probe after each weight sync, in which both have the "
        f"rounded weights, by {AgreementOptions().limits(dtype)[1]:g}"
    )


def check_names(data: Sequence[DataOptions], stage: Stage, roles: Roles) -> None:
    """Raise UserError for a reward, hook or data card that is not there, or not meant for the stage; and for data without a card that cannot be read."""
    there = [one for one in data if one.card or not to_be_made(one.path)]
    asked = []
    if roles.evaluation is not None and (roles.evaluation.cards or not to_be_made(roles.evaluation.path)):
        asked = evaluated(roles.evaluation, there)
    trained = [card_of(one) for one in there]
    if roles.rewards:
        judged = (
            [] if stage == "reward_model" else trained
        )  # of pairs nothing is scored but the answers to what is asked
        check_rewards(roles.rewards, [*judged, *(entry.card for entry in asked)])
    for one, card in zip(there, trained, strict=True):
        check_split(card, one.split, stage, "data.split")
    if roles.evaluation is not None:
        for entry in asked:
            check_split(entry.card, roles.evaluation.split, "eval", "evaluation.split")
        choosing = roles.evaluation.every is not None and there == data and bool(asked)
        check_evaluation_cards(asked, choosing=choosing)
        for hook in roles.evaluation.hooks:
            hooks.check_params(hook.name, hook.params)


def to_be_made(path: Path | None) -> bool:
    """Whether an earlier stage of a pipeline still makes the files: of others that are not there, loading the recipe has told."""
    return path is not None and path.is_absolute() and not path.exists() and not glob(str(path), recursive=True)


def check_components(recipe: Recipe) -> None:
    """Raise UserError for a component of the rewards that the guard or `evaluation.against` names and that is not there, or not to be compared."""
    named: dict[str, str] = {}
    if isinstance(recipe, GrpoRecipe) and recipe.guard is not None:
        named = {"guard.learned": recipe.guard.learned, "guard.trusted": recipe.guard.trusted}
    if isinstance(recipe, PolicyRecipe) and recipe.evaluation.against is not None:
        named["evaluation.against.judge"] = recipe.evaluation.against.judge
    rewards = recipe.roles().rewards
    terms = {key: [term for term in rewards if term.component == name] for key, name in named.items()}
    known = list(dict.fromkeys(term.component for term in rewards))
    for key, name in named.items():
        if not terms[key]:
            raise UserError(
                f"{key}: no reward of the recipe is called {name!r}{nearest(name, known)}; there are {', '.join(known)}"
            )
    if "guard.learned" in terms and not any(
        share_a_domain(*pair) for pair in product(terms["guard.learned"], terms["guard.trusted"])
    ):
        raise UserError("guard: its two rewards judge samples of no domain in common, so they cannot be compared")


def check_rewards(rewards: Sequence[RewardTerm], cards: Sequence[DataCard]) -> None:
    """Raise UserError for a reward that cannot be made, and for a domain of the cards that none with a weight is for; where all weights are 0, none at all."""
    with naming("rewards"), reward_errors():
        Mixture(rewards)
    measures = not any(term.weight for term in rewards)
    for domain in sorted({domain for card in cards for domain in domains_of(card)}):
        if not is_judged(rewards, domain):
            raise UserError(
                f"rewards: none {'' if measures else 'with a weight '}is for the domain {domain!r} of the recipe's data or evaluation; "
                f"add one such as {{name: NAME, domains: [{domain}]}}"
            )


def check_columns(rewards: Sequence[RewardTerm], examples: Iterable[Example]) -> None:
    """Raise UserError for a column that a reward needs and that no example of a domain has."""
    if not rewards:
        return
    mixture = Mixture(rewards)
    # These compare with the ground truth, which a column of that name need not hold; a function in a file reads the column.
    registered = {term.component for term in rewards if term.file is None}
    firsts: dict[str, Example] = {}
    missing: dict[str, list[tuple[str, str]]] = {}
    for each in examples:
        if each.domain not in firsts:
            firsts[each.domain] = each
            wanted = mixture.columns(each.domain)
            missing[each.domain] = [(component, column) for component, columns in wanted.items() for column in columns]
        if missing[each.domain]:
            there = columns_of({**each.metadata, **MADE_HERE}, each.answer)
            missing[each.domain] = [
                (component, column)
                for component, column in missing[each.domain]
                if column not in there or (column == "answer" and component in registered and each.answer is None)
            ]
    for domain, first in firsts.items():
        for component, column in missing[domain]:
            columns = sorted(columns_of({**first.metadata, **MADE_HERE}, first.answer))
            lack = "have, but without text or a number in it" if column in columns else "lack"
            raise UserError(
                f"rewards: {component} reads the column {column!r}, which the data of the domain {domain!r} {lack} (such as "
                f"{first.id}); their columns: {', '.join(columns)}. Add it to the data, or give the reward `domains`{prompt_hint([column])}"
            )


def check_evaluation_cards(asked: Sequence[Entry], *, choosing: bool) -> None:
    """Raise UserError for two cards of one name, and where no card has problems to choose checkpoints by."""
    cards = [entry.card for entry in asked]
    for name, count in Counter(entry.card.name + entry.mark for entry in asked).items():
        if count > 1:
            raise UserError(
                f"evaluation.cards: {count} cards are named {name!r}, and their results could not be told apart"
            )
    if choosing and not any("validation" in card.splits for card in cards):
        raise UserError(
            f"evaluation.every: checkpoints are chosen by the validation split, and {', '.join(card.name for card in cards)} "
            "has none: add a card with one to evaluation.cards, or leave every out"
        )


def check_split(card: DataCard, split: SplitName, stage: Stage, where: str) -> None:
    """Raise UserError where a data card is not meant for the stage or lacks the split."""
    require_stage(card, stage)
    if split not in card.splits:
        raise UserError(f"{where}: {card.called} has no split {split!r}, only {', '.join(sorted(card.splits))}")


def check_places(recipe: Recipe, gpus: int) -> None:
    """Raise UserError where this machine, which has so many GPUs, lacks what the processes take: Ray would wait for it without end."""
    roles = recipe.roles()
    for key, options in (("learner", roles.learner), ("rollout", roles.rollout)):
        if options is not None and options.resources:
            raise UserError(
                f"{key}.resources: {', '.join(options.resources)} can only be of the nodes of a cluster: set RAY_ADDRESS, or leave it out"
            )
    free = [1.0] * gpus
    if gpus >= roles.gpus > 0 and not all(take(free, part) for part in roles.gpu_parts):
        raise UserError(
            f"learner.gpus, rollout.gpus, scoring.gpus: parts of GPUs that do not fit on the {gpus} of this machine: Ray starts the rollout workers, "
            "then scoring workers, then learner ranks, each where least is left. Let ranks and workers share GPUs by colocate=true, or take other parts"
        )
    if not 0 < gpus < roles.gpus:
        return
    cure = "lower learner.ranks, rollout.workers, rollout.tensor_parallel or scoring.gpus"
    pairs = int(gpus - roles.scoring_gpus)
    if isinstance(recipe, PolicyRecipe) and pairs > 0 and not recipe.colocate and recipe.rollout.tensor_parallel == 1:
        cure = f"share them between learner ranks and rollout workers, colocate=true learner.ranks={pairs} rollout.workers={pairs}"
    raise UserError(
        f"the recipe takes {roles.gpus:g} GPUs, and this machine has {gpus}: {cure}; set RAY_ADDRESS to a cluster that has them; or install "
        "engines for CPUs (`export ACCELERATOR=cpu`, then `make clean setup`)"
    )


def check_model(recipe: Recipe) -> list[str]:
    """Look at the model's small files, by the options of those that load it. Raises UserError for what cannot be trained or sampled from.

    Returns notes: what `all-linear` leaves out, and why nothing was looked at where the model is still to be made or its hub cannot be reached.
    """
    model, roles, path = recipe.model, recipe.roles(), Path(recipe.model.path)
    if path.is_absolute() and not path.exists():
        return [f"not looked at: model.path: {path} is still to be made"]
    try:
        if not model.trust_remote_code:
            read_config(model.path)
        tokenizer = load_tokenizer(model.path, trust_remote_code=model.trust_remote_code)
    except UserError as error:
        if path.is_dir():
            raise
        return [f"not looked at: {error}"]
    goes_on = roles.trained == "reward_model" and is_reward_model(model)
    verdict(examine(model, tokenizer, reward_model=goes_on, rollout=roles.rollout), model.path)
    skeleton = shapes_of(model)
    notes: list[str] = []
    if roles.rollout is None:
        check_length(skeleton.config.get_text_config(), roles.longest, model.path)
    rows, longest = skeleton.get_input_embeddings().weight.shape[0], roles.rollout.max_length if roles.rollout else 0
    if roles.teacher is not None:
        notes += check_scorer(
            "grpo.distill.teacher", ModelOptions(path=roles.teacher), model.path, tokenizer, rows, longest
        )
    if isinstance(recipe, GrpoRecipe) and recipe.reference is not None:
        reference = ModelOptions(path=str(recipe.reference), trust_remote_code=model.trust_remote_code)
        if recipe.reference.is_dir():
            check_model_directory(recipe.reference, reference, "reference")
        notes += check_scorer("reference", reference, model.path, tokenizer, rows, longest)
    if (learner := roles.learner) is not None:
        if learner.expert_parallel > 1:
            check_spreadable(skeleton.config, learner.expert_parallel)
        factors_of(learner.balance, skeleton.config)
        frozen_names((name for name, _ in skeleton.named_parameters()), learner.freeze)
        if learner.lora is not None:
            adapted_names(skeleton, learner.lora)
            notes += filter(None, [left_out(parts_of(skeleton), learner.lora.targets)])
    sizes = model_sizes(skeleton)
    if not sizes.is_mixture:
        replay = recipe.grpo.routing_replay if isinstance(recipe, GrpoRecipe) else "off"
        refuse_without_experts(model.path, roles.rollout, replay)
    if roles.weights is not None and roles.weights.transport == "adapter":
        check_adapters_are_served(model.path, sizes)
    if roles.weights is not None and roles.weights.transport == "object_store" and not cluster_address():
        sent = sent_bytes(model, roles.learner.lora if roles.learner else None)
        notes += filter(None, [object_store_bytes(sent, shared_memory_bytes(), memory_bytes()[1])[1]])
    if isinstance(recipe, TrainingRecipe) and not any(recipe.directory.glob("checkpoints/step_*")):
        check_space(recipe, bytes_needed(recipe, sizes.total))
    return notes


def check_length(config: Any, longest: int, path: str) -> None:
    """Raise UserError where a reward model, which is not sampled from, has other or no positions for its longest conversations."""
    rope, positions = getattr(config, "rope_parameters", None) or {}, positions_of(config)
    if rope.get("rope_type") == "longrope":  # beyond it the factors of a sequence are those of the longest beside it
        positions = min(positions, short_positions(config))
    if longest > positions:
        raise UserError(
            f"reward_model.max_length is {longest}, and {path} has {positions:.0f} positions: lower it to that, or take another model"
        )


def check_scorer(key: str, model: ModelOptions, policy: str, tokenizer: Any, rows: int, max_length: int) -> list[str]:
    """Raise UserError unless the model that `key` of the recipe names can score what the policy samples: it has the policy's token ids, of which
    there are `rows`, positions for `max_length` tokens, and all of its weights.

    Returns a note where the model is still to be made.
    """
    path = model.path
    if Path(path).is_absolute() and not Path(path).exists():
        return [f"not looked at: {key}: {path} is still to be made"]
    try:
        config = find_config(path, trust_remote_code=model.trust_remote_code)
        theirs = load_tokenizer(path, trust_remote_code=model.trust_remote_code).get_vocab()
    except UserError as error:
        raise UserError(f"{key}: {str(error).removeprefix('model.path: ')}") from None
    if config is None:
        raise UserError(
            f"{key}: {path} has no configuration that transformers reads without running code of the model's own"
        )
    if different := tokenizer.get_vocab().items() ^ theirs.items():
        token, id_ = min(different, key=lambda pair: (pair[1], pair[0]))
        whose = path if theirs.get(token) == id_ else f"the policy {policy}"
        raise UserError(
            f"{key}: {path} has other token ids than {policy}: {id_} is {token!r} of {whose} alone, one of {len(different)} "
            "differences. It reads what the policy sampled as ids: take a model with the same tokenizer"
        )
    if (known := config.get_text_config().vocab_size) < rows:
        raise UserError(
            f"{key}: {path} has probabilities of {known} token ids, and {policy} can sample {rows}: take a model with as many"
        )
    if max_length > (positions := positions_of(config.get_text_config())):
        raise UserError(
            f"{key}: {path} has {positions:g} positions, and rollout.max_length is {max_length}: lower it, or take another model"
        )
    if Path(path).is_dir() and not getattr(config, "quantization_config", None):
        status, detail = check_checkpoint(skeleton_of(model), Path(path))
        if status is FAILED:
            raise UserError(f"{key}: {path}: {detail}")
    return []


def check_adapters_are_served(path: str, sizes: ModelSizes) -> None:
    """Raise UserError where vLLM cannot add an adapter to a policy on this machine; of a cluster that is joined, nothing is known yet."""
    if not torch.cuda.is_available() and not cluster_address() and sizes.is_mixture:
        raise UserError(
            f"weights.transport: vLLM adds no adapters to a model with experts ({path}) on a CPU; leave it out, and the workers "
            "get merged weights"
        )


def refuse_without_experts(path: str, rollout: FleetOptions | None, replay: Replay) -> None:
    """Raise UserError for options of routing, of a model that routes nothing."""
    if replay != "off" or (rollout is not None and rollout.record_experts):
        key = "grpo.routing_replay" if replay != "off" else "rollout.record_experts"
        raise UserError(f"{key} is for a mixture of experts, and {path} is dense: leave it out")
