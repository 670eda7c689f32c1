"""A recipe on a cluster: its processes with their memory, their places, the time of a step, and what stands in the way."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from pydantic import ValidationError

from align.model.lora import left_out
from align.model.sizes import ELEMENT_BYTES, KNOWN_NAMES, ModelSizes, gib, sizes_of
from align.plan import refusals
from align.plan.memory import Work, at_rest, parts_of_layers
from align.plan.placement import Cluster, place
from align.plan.roles import LEARNER, PINNED, SCORING, WORKER, Role, demands, host_memory, roles_of, work_of
from align.plan.times import step_seconds
from align.recipe import BFLOAT16_SUMS, MERGED_ADAPTERS, PlannedStage, PolicyRecipe, Recipe
from align.recipe.load import apply_override
from align.recipe.roles import reward_models
from align.run.machine import store_size
from rollout import FleetOptions

THROUGH = {
    "broadcast": "one broadcast from the device of rank 0 to theirs",
    "object_store": "Ray's shared memory: the nodes of rank 0 and of workers hold them twice, those of before included",
    "directory": "files in the run directory, which holds them twice, those of before included",
    "adapter": "the adapter's files in the run directory",
}
"""The way of new weights to the workers, by `weights.transport`."""


@dataclass(frozen=True, slots=True)
class Plan:
    """`refusals` say what cannot be and what to change; without any the recipe fits. `advice`: overrides by which it would, where we know some.

    `nodes` says for each what is placed on it, and how many bytes of its own memory that takes.
    """

    roles: Sequence[Role]
    nodes: Sequence[tuple[str, float]]
    seconds: dict[str, float]
    notes: Sequence[str]
    refusals: Sequence[str]
    advice: str


def plan_stages(stages: Sequence[PlannedStage], cluster: Cluster) -> Iterator[tuple[PlannedStage, ModelSizes, Plan]]:
    """Plan stages in their order, with the models that those before them make.

    Raises UserError for a model whose configuration is not to be had, and for LoRA targets that it does not have.
    """
    made: dict[str, ModelSizes] = {}
    for stage in stages:
        policy, roles = stage.recipe.model.path, stage.recipe.roles()
        needed = [policy, roles.teacher] if roles.teacher else [policy]
        for path in [*needed, *reward_models(roles.rewards)]:
            if path not in made and (path in needed or path in KNOWN_NAMES or Path(path).is_dir()):
                made[path] = sizes_of(path)
        sizes = made[policy]
        yield stage, sizes, make_plan(stage.recipe, sizes, cluster, made)
        made[str(stage.directory.absolute() / "final")] = sizes


def make_plan(
    recipe: Recipe, sizes: ModelSizes, cluster: Cluster, others: Mapping[str, ModelSizes] = MappingProxyType({})
) -> Plan:
    """Plan a recipe of any stage, of whose reward models and teacher `others` has the sizes by their paths. Raises UserError for LoRA targets that the model does not have."""
    work = work_of(recipe.roles(), sizes, ELEMENT_BYTES[recipe.model.dtype], others)
    roles = roles_of(work, cluster, others)
    nodes, unplaced = place(cluster, demands(work.roles.colocated, roles))
    host = [host_memory(node, roles, work) for node in nodes]
    named = {role.name: role for role in roles}
    found = refusals.too_few(work.roles, roles, unplaced, cluster)
    if work.training and cluster.gpus:
        found += refusals.too_much_to_learn(work.training, named[LEARNER], cluster)
    if work.roles.rollout:
        found += refusals.too_much_to_sample(work, work.roles.rollout, named[WORKER], cluster)
    if work.roles.scoring:
        found += refusals.too_much_to_score(named[SCORING])
    if cluster.gpus:
        found += refusals.too_much_for_the_nodes(host, cluster)
    else:
        found += refusals.too_much_for_the_machine(recipe.machine.memory_gb, roles)
    seconds = step_seconds(work, named[WORKER].parts if WORKER in named else None, cluster.gpus_per_node)
    advice = way_to_share(recipe, sizes, cluster, others) if found and cluster.gpus else ""
    places = [(str(node), size) for node, size in zip(nodes, host, strict=True)]
    return Plan(roles, places, seconds, notes(work), found, advice)


def way_to_share(recipe: Recipe, sizes: ModelSizes, cluster: Cluster, others: Mapping[str, ModelSizes]) -> str:
    """Overrides by which a recipe fits that does not, with a learner rank and a rollout worker on each GPU; "" where none of ours helps."""
    if not isinstance(recipe, PolicyRecipe) or recipe.colocate or min(recipe.learner.gpus, recipe.rollout.gpus) < 1:
        return ""
    gpus = cluster.gpus - (math.ceil(recipe.scoring.workers * recipe.scoring.gpus) if recipe.rewards else 0)
    each = f"learner.ranks={gpus} rollout.workers={gpus}"
    each += " rollout.tensor_parallel=1" if recipe.rollout.tensor_parallel > 1 else ""
    each += " weights.transport=object_store" if recipe.weights.transport == "broadcast" else ""
    in_parts = "learner.gpus=0.6 rollout.gpus=0.4 rollout.gpu_memory_share=0.45"
    in_turn = f"colocate=true learner.zero_stage={2 if recipe.learner.lora else 3}"
    if "gpu_memory_share" in recipe.rollout.model_fields_set:  # which has no effect there
        in_turn += f" rollout.gpu_memory_share={FleetOptions().gpu_memory_share}"
    for changes in (f"{way} {each}" for way in (in_parts, in_turn) if gpus > 0):
        values = recipe.model_dump(mode="json", exclude_unset=True)
        for change in changes.split():
            apply_override(values, change)
        try:
            changed = type(recipe).model_validate(values)
        except ValidationError:
            continue
        if not make_plan(changed, sizes, cluster, others).refusals:
            return changes
    return ""


def notes(work: Work) -> list[str]:
    """What else a reader needs to know."""
    found = [f"the KV cache takes {work.kv_bytes:,} bytes a token ({work.sizes.kv_a_token:,} elements)"]
    if work.training is None:
        return found
    options = work.training.options
    if work.element < 4 and not options.zero_stage:
        found.append(BFLOAT16_SUMS)
    if work.element < 4 and options.zero_stage == 3 and options.lora is not None:
        found.append(MERGED_ADAPTERS)
    if options.lora is not None and (omitted := left_out(parts_of_layers(work.sizes), options.lora.targets)):
        found.append(omitted)
    whole = gib(work.weight_bytes)
    found.append(f"learner rank 0 has the whole model in its node's memory at the start and at the end: {whole}")
    if work.roles.colocated:
        rank = gib(at_rest(work.training))
        found.append(
            f"in turns: at rest, a rank has {rank} in its node's memory, a rollout worker {gib(PINNED * work.weight_bytes)}"
        )
    if work.roles.weights:
        sent, through = gib(work.sent * work.element), THROUGH[work.roles.weights.transport]
        found.append(f"{sent} of new weights go to the workers after an update, through {through}")
        if work.stored_bytes:
            size = store_size(work.sent * work.element)
            found.append(f"Ray's object store takes {gib(size)} of /dev/shm, so that they do not go over the disk")
    if (rounds := work.roles.sampling_rounds) > 1:
        once = work.roles.sampled_sequences
        found.append(
            f"grpo.refill_rounds: a step samples {once:,} completions, and {rounds * once:,} where in each round all groups are without variance: its "
            "seconds of sampling are for that"
        )
    if work.unrounded_bytes:
        found.append(
            f"weights.precision: while the sync is checked, {gib(work.unrounded_bytes)} of unrounded weights wait in the CPU's memory, "
            + ("on rank 0" if options.zero_stage == 3 else "on each rank")
        )
    if work.route_bytes:
        found.append(
            f"the experts of a step's tokens, {work.sizes.routes_a_token} bytes a token, take {gib(work.route_bytes)} of Ray's object store at "
            "most, where they are replayed or recorded"
        )
    return found


def as_text(title: str, dtype: str, sizes: ModelSizes, cluster: Cluster, plan: Plan) -> str:
    """The plan of the recipe with that title, a few lines for each question that it answers."""
    places = [
        f"node {number}: {held} ({gib(size)} of {gib(cluster.node_memory)} of its own memory)"
        for number, (held, size) in enumerate(plan.nodes)
    ]
    lines = [
        f"{title} on {cluster}",
        f"model: {sizes.total:,} parameters, {sizes.active:,} of them for a token, {dtype}",
        "",
        "places (Ray chooses them; this is one way)" if cluster.gpus else "processes",
        *(f"  {line}" for line in (places if cluster.gpus else [f"{r.count} x {r.name}" for r in plan.roles])),
        "",
        "memory" + (" of one GPU" if cluster.gpus else ", resident, of one process"),
    ]
    for role in plan.roles:
        on = f" of {gib(role.limit)}" if role.gpus else " (on the CPU)" if cluster.gpus else ""
        parts = ", ".join(f"{name} {gib(size)}" for name, size in role.parts.items() if size)
        lines.append(f"  {role.name}: {gib(role.total)}{on}: {parts}")
    if plan.seconds:
        lines += ["", "seconds of a step, at most (assumed rates: align/plan/times.py)"]
        lines += [
            f"  {phase}: {seconds:,.0f}" if seconds >= 10 else f"  {phase}: {seconds:.2g}"
            for phase, seconds in plan.seconds.items()
        ]
    return "\n".join([*lines, "", *plan.notes])
