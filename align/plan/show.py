"""A plan as text."""

from align.model.sizes import ModelSizes
from align.plan.placement import Cluster
from align.plan.plan import Plan, gib
from align.recipe import Recipe


def as_text(recipe: Recipe, sizes: ModelSizes, cluster: Cluster, plan: Plan) -> str:
    """The plan of a recipe, a few lines for each question that it answers."""
    lines = [
        f"{recipe.name} ({recipe.stage}) on {cluster}",
        f"model: {sizes.total:,} parameters, {sizes.active:,} of them for a token, {recipe.model.dtype}",
        "",
        "places (Ray chooses them; this is one way)" if cluster.gpus else "processes",
        *(f"  {line}" for line in (plan.nodes if cluster.gpus else [f"{r.count} x {r.name}" for r in plan.roles])),
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
