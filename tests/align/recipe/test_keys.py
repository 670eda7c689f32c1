"""Each key of a recipe is read by code that its stage runs, or it is refused.

The readers are found by types: mypy tells of every attribute read whose it is, and which functions refer to which others. So a
new key that a stage takes and never reads fails here, and so does an old one whose last reader goes.
"""

import ast
import copy
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from mypy import build, nodes
from mypy.find_sources import create_source_list
from mypy.options import Options
from mypy.types import Instance, Type, UnionType, get_proper_type
from pydantic import ValidationError

from align.recipe import STAGES

from .sections import keys_of

ROOT = Path(__file__).parents[3]
PACKAGES = ("align", "rollout", "reward")
COMMANDS = {stage: f"align.stages.commands.run_{stage}" for stage in STAGES}
CHECKS = (
    "align.recipe.load",
    "align.recipe.pipeline",
    "align.session.checks",
    "align.session.disk",
    "align.plan",
)
"""What reads keys to check, compare or print them: that is no effect."""
BEFORE = "align.stages.commands.policy_of"
"""Runs the stage before another, from a recipe of its own."""
PLANS = "align.recipe.pipeline.load_stage"
"""Reads which stage that is."""
MACHINE = "align.session.checks.check_recipe"
"""Reads what the machine must have: to refuse a smaller one is the effect; and which other keys a preset has been expanded to."""

BASE: dict[str, Any] = {"name": "a", "model": {"path": "p"}, "data": [{"card": "nano_math"}]}
LEARNER = {"learner": {"optimizer": {"learning_rate": 1e-3}}}
REWARDS = {"rewards": [{"name": "exact_answer"}]}
VALID: dict[str, dict[str, Any]] = {
    "sft": BASE | LEARNER | REWARDS | {"stage": "sft", "sft": {"steps": 1}},
    "reward_model": BASE | LEARNER | {"stage": "reward_model", "reward_model": {"steps": 1}},
    "dpo": BASE
    | LEARNER
    | REWARDS
    | {"stage": "dpo", "evaluation": {"cards": ["nano_math"]}, "dpo": {"steps": 1, "pairs_per_step": 1}},
    "grpo": BASE | LEARNER | REWARDS | {"stage": "grpo", "grpo": {"steps": 1, "prompts_per_step": 1, "group_size": 2}},
    "preferences": BASE | REWARDS | {"stage": "preferences"},
}
SUPERVISED: dict[str, Any] = {
    "data.split": "validation",
    "evaluation.every": 5,
    "alarms.entropy_share": 0.5,
    "alarms.zero_variance_groups": 0.5,
    "alarms.reward_jump": 2.0,
    "weights.precision": "int8",
}
REFUSED: dict[str, dict[str, Any]] = {
    "sft": SUPERVISED | {"learner.share_prompts": True},
    "dpo": SUPERVISED | {"data.levels": [1]},
    "reward_model": {"data.split": "validation", "data.levels": [1], "learner.share_prompts": True},
    "grpo": {"reference": "somewhere"},
    "preferences": {"data.split": "validation", "data.share": 2.0, "run.allow_changes": True},
}
"""Keys that do nothing in a stage (or without another key), each with a value that is not its default."""
EVERYWHERE = {"data.split": "test"}
TAUGHT: dict[str, Any] = {"rewards": [], "grpo.distill.teacher": "t"}
ALONE: list[tuple[str, str, dict[str, Any]]] = [
    (
        "grpo",
        "learner.optimizer.final_ratio",
        {"learner.optimizer.schedule": "constant", "learner.optimizer.final_ratio": 0.5},
    ),
    ("grpo", "weights.bucket_mb", {"weights.transport": "adapter", "learner.lora": {}, "weights.bucket_mb": 1}),
    ("grpo", "weights.precision", {"model.dtype": "bfloat16", "weights.precision": "bfloat16"}),
    ("grpo", "agreement.stop_routing", {"agreement.stop_routing": 0.1}),
    ("sft", "agreement.stop_routing", {"agreement.stop_routing": 0.1}),
    ("grpo", "grpo.kl", {"grpo.kl": "k2"}),
    ("grpo", "grpo.clip_low", {"grpo.cispo_max": 5, "grpo.clip_low": 0.1}),
    ("grpo", "grpo.clip_high", {"grpo.cispo_max": 5, "grpo.clip_high": 0.1}),
    ("grpo", "grpo.correction.level", {"grpo.correction.level": "token"}),
    ("grpo", "grpo.correction.low", {"grpo.correction.low": 0.5}),
    ("grpo", "grpo.correction.high", {"grpo.correction.high": 2}),
    ("grpo", "grpo.correction.low", {"grpo.correction.kind": "tis", "grpo.correction.low": 0.5}),
    ("grpo", "grpo.correction.level", {"grpo.correction.kind": "sequence_mask", "grpo.correction.level": "token"}),
    ("grpo", "grpo.correction.level", {"grpo.correction.kind": "geometric_mask", "grpo.correction.level": "sequence"}),
    ("grpo", "data.split", {"data.split": "validation", "evaluation.every": 5}),
    ("grpo", "skip_zero_gradient", {"grpo.distill.teacher": "t", "grpo.skip_zero_gradient": True}),
    ("grpo", "rewards", {"rewards": []}),
    ("grpo", "rewards", {"rewards": [{"name": "exact_answer", "weight": 0}]}),
    ("grpo", "grpo.group_size", {"grpo.distill.teacher": "t", "grpo.group_size": 1}),
    ("grpo", "grpo.preset", {**TAUGHT, "grpo.preset": "dapo"}),
    ("grpo", "grpo.clip_high", {**TAUGHT, "grpo.clip_high": 0.3}),
    ("grpo", "grpo.level", {**TAUGHT, "grpo.level": "geometric"}),
    ("grpo", "grpo.refill_rounds", {**TAUGHT, "grpo.refill_rounds": 1}),
    ("grpo", "alarms.reward_jump", {**TAUGHT, "alarms.reward_jump": 2}),
    ("grpo", "evaluation.every", {**TAUGHT, "evaluation.every": 5}),
    ("grpo", "scoring", {**TAUGHT, "scoring.workers": 2}),
    ("sft", "evaluation.samples", {"rewards": [], "evaluation.samples": 8}),
    ("sft", "scoring", {"rewards": [], "scoring.workers": 2}),
]
"""Keys of a stage that another key takes the effect from."""


def name_of(section: type) -> str:
    return f"{section.__module__}.{section.__qualname__}"


def with_keys(stage: str, values: dict[str, Any]) -> dict[str, Any]:
    """The valid recipe of a stage with some keys set."""
    recipe = copy.deepcopy(VALID[stage])
    for key, value in values.items():
        *parents, last = key.split(".")
        at = recipe
        for parent in parents:
            at = at["data"][0] if parent == "data" else at.setdefault(parent, {})
        at[last] = value
    return recipe


class Code:
    """What the functions of the packages refer to, and the attributes that they read, as (class, attribute)."""

    def __init__(self) -> None:
        options = Options()
        options.follow_imports, options.ignore_missing_imports = "skip", True
        options.export_types, options.preserve_asts, options.incremental = True, True, False
        options.check_untyped_defs, options.cache_dir = True, "/dev/null"
        built = build.build(create_source_list([str(ROOT / package) for package in PACKAGES], options), options)
        self._types = built.types
        self.refers: dict[str, set[str]] = defaultdict(set)
        self.reads: dict[str, set[tuple[str, str]]] = defaultdict(set)
        self._methods: dict[str, set[str]] = defaultdict(set)
        for module, tree in built.files.items():
            if module.partition(".")[0] in PACKAGES:
                self._look_at(module, tree)

    def run_by(self, root: str, without: tuple[str, ...], sections: set[str]) -> set[str]:
        """Every function that `root` may come to. A class that is referred to may have all its methods called, a section none."""
        found: set[str] = set()
        due = [root]
        while due:
            at = due.pop()
            if at not in found and not at.startswith(without):
                found.add(at)
                due += self.refers[at]
                due += () if at in sections else self._methods[at]
        return found

    def _look_at(self, module: str, tree: nodes.MypyFile) -> None:
        places = dict(lines_of(ast.parse(Path(tree.path).read_text(encoding="utf-8")), module))
        for expression in expressions(tree.defs):
            here = places.get(expression.line, module)
            if isinstance(expression, nodes.SuperExpr):
                found = [
                    base.names[expression.name].node for base in above(expression) if expression.name in base.names
                ]
                if found and found[0] is not None:
                    self._refer(here, found[0])
                continue
            if expression.node is not None:
                self._refer(here, expression.node)
            if isinstance(expression, nodes.MemberExpr):
                for owner in classes_of(self._types.get(expression.expr)):
                    self.reads[here].add((owner.fullname, expression.name))
                    member = owner.get(expression.name)
                    if member is not None and member.node is not None:
                        self._refer(here, member.node)

    def _refer(self, here: str, to: nodes.SymbolNode) -> None:
        self.refers[here].add(to.fullname)
        if isinstance(to, nodes.TypeInfo):
            own = [symbol.node for owner in to.mro for symbol in owner.names.values()]
            functions = nodes.FuncDef | nodes.Decorator | nodes.OverloadedFuncDef
            self._methods[to.fullname] = {node.fullname for node in own if isinstance(node, functions)}


def lines_of(tree: ast.Module | ast.ClassDef, at: str) -> Iterator[tuple[int, str]]:
    """(line, function) of every line in a function or method; what is nested belongs to the outermost."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from ((line, f"{at}.{node.name}") for line in range(node.lineno, (node.end_lineno or 0) + 1))
        elif isinstance(node, ast.ClassDef):
            yield from lines_of(node, f"{at}.{node.name}")


def above(expression: nodes.SuperExpr) -> list[nodes.TypeInfo]:
    """The classes in which `super()` looks, in their order."""
    return expression.info.mro[1:] if expression.info else []


def expressions(root: Any) -> Iterator[nodes.RefExpr | nodes.SuperExpr]:
    """Every name and attribute below a node of mypy's."""
    seen: set[int] = set()
    due = [root]
    while due:
        node = due.pop()
        if isinstance(node, list | tuple):
            due += node
        elif isinstance(node, nodes.Node) and not isinstance(node, nodes.TypeInfo | nodes.Var) and id(node) not in seen:
            seen.add(id(node))
            if isinstance(node, nodes.RefExpr | nodes.SuperExpr):
                yield node
            due += [getattr(node, name, None) for name in parts_of(type(node))]


@cache
def parts_of(kind: type) -> list[str]:
    """The attributes of a node in which nodes below it may be; not those that lead to definitions elsewhere."""
    elsewhere = {"node", "info", "type", "defn", "analyzed", "partial_fallback", "original_def"}
    names = {name for base in kind.__mro__ for name, value in vars(base).items() if hasattr(value, "__get__")}
    return [name for name in names - elsewhere if not name.startswith("__") and not callable(getattr(kind, name))]


def classes_of(kind: Type | None) -> Iterator[nodes.TypeInfo]:
    proper = get_proper_type(kind)
    if isinstance(proper, Instance):
        yield proper.type
    elif isinstance(proper, UnionType):
        for item in proper.items:
            yield from classes_of(item)


@pytest.fixture(scope="module")
def code() -> Code:
    return Code()


@pytest.mark.parametrize("stage", STAGES)
def test_every_key_of_a_stage_is_read_by_what_it_runs_or_is_refused(code: Code, stage: str) -> None:
    keys = list(keys_of(STAGES[stage]))
    sections = {name_of(section) for _, section, _ in keys}
    functions = code.run_by(COMMANDS[stage], (*CHECKS, BEFORE), sections) | {PLANS, MACHINE}
    assert "align.session.run.open_run" in functions
    read = set[tuple[str, str]]().union(*(code.reads[function] for function in functions))
    unread = [
        key
        for key, section, field in keys
        if not {(name_of(other), field) for other in (*section.__mro__, *section.__subclasses__())} & read
    ]
    assert sorted(set(unread) - REFUSED[stage].keys()) == []


@pytest.mark.parametrize(
    ("stage", "key", "value"),
    [(stage, *pair) for stage in STAGES for pair in REFUSED[stage].items()]
    + [(stage, *pair) for stage in STAGES for pair in EVERYWHERE.items()],
)
def test_a_key_that_would_do_nothing_is_refused_by_its_name(stage: str, key: str, value: Any) -> None:
    STAGES[stage].model_validate(VALID[stage])
    with pytest.raises(ValidationError, match=key.replace("data.split", "split").replace(".", r"\.")):
        STAGES[stage].model_validate(with_keys(stage, {key: value}))


@pytest.mark.parametrize(("stage", "key", "values"), ALONE)
def test_a_key_that_another_one_makes_useless_is_refused_by_its_name(
    stage: str, key: str, values: dict[str, Any]
) -> None:
    with pytest.raises(ValidationError, match=key.replace(".", r"\.")):
        STAGES[stage].model_validate(with_keys(stage, values))


@pytest.mark.parametrize("rewards", [[], [{"name": "exact_answer", "weight": 0}]])
def test_a_teacher_may_be_all_that_is_learned_from(rewards: list[Any]) -> None:
    given = {**TAUGHT, "rewards": rewards, "grpo.group_size": 1, "grpo.kl_coefficient": 0.1, "grpo.level": "geometric"}
    recipe = STAGES["grpo"].model_validate(with_keys("grpo", given))
    assert recipe.roles().teacher == "t"
    assert (recipe.roles().scoring is None) == (rewards == [])
