"""Modules and names that moved: the old ones still import, with a DeprecationWarning that names the new one."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODULES = {
    "answer_format": "form",
    "chat_rules": "nano_chat",
    "code_blocks": "code.blocks",
    "code_cases": "code.cases",
    "code_tests": "code.answer",
    "conversation": "learned.model",
    "endpoint": "learned.endpoint",
    "final_answer": "math.final_answer",
    "killable": "isolation.pool",
    "killable.types": "isolation.pool",
    "math_answer": "math.answer",
    "math_form": "math.form",
    "math_text": "math.text",
    "math_value": "math.value",
    "reasoning_gym_answer": "reasoning_gym.answer",
    "rules": "form",
    "sandbox": "isolation",
    "sandbox.check": "isolation.executors",
    "sandbox.client": "isolation.zygote",
    "sandbox.inside": "isolation.child",
    "sandbox.inside.plain": "isolation.child.plain",
    "sandbox.local": "isolation.executors",
    "sandbox.packages": "isolation.zygote",
    "sandbox.types": "isolation.types",
}
"""Modules of this package by their old names."""

NAMES = {
    ("isolation.pool", "Killable"): "WorkerPool",
    ("isolation.pool", "Limits"): "WorkerLimits",
    ("isolation.pool", "WorkersUnavailable"): "SandboxFailure",
    ("instructions", "judge"): "check",
    ("instructions", "Judgement"): "Checked",
}
"""What has another name now, by its new module and its old name."""


class OldModule(ModuleType):
    """A module under its old name: it forwards to the module that it has become."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__all__":  # the import system asks for its own
            raise AttributeError(name)
        place = MODULES[self.__name__.removeprefix("reward.")]
        new = importlib.import_module(f"reward.{place}")
        return getattr(new, NAMES.get((place, name), name))

    def __setattr__(self, name: str, value: Any) -> None:
        if not isinstance(value, OldModule):  # a submodule, which must not hide a function of its name
            super().__setattr__(name, value)


class OldModules:
    """Finder and loader of the modules above."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, old = name.partition(".")
        return ModuleSpec(name, self, is_package=True) if package == "reward" and old in MODULES else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> OldModule:
        return OldModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        place = MODULES[module.__name__.removeprefix("reward.")]
        warnings.warn(f"{module.__name__} is reward.{place} now", DeprecationWarning, stacklevel=2)


def install() -> None:
    """Make the old modules importable. They are looked for after all others."""
    if not any(isinstance(finder, OldModules) for finder in sys.meta_path):
        sys.meta_path.append(OldModules())


def of(module: str) -> Callable[[str], Any]:
    """A `__getattr__` for the module `reward.<module>`, some of whose names have changed."""

    def forward(name: str) -> Any:
        new = NAMES.get((module, name))
        if new is None:
            raise AttributeError(f"module 'reward.{module}' has no attribute {name!r}")
        warnings.warn(f"reward.{module}.{name} is {new} now", DeprecationWarning, stacklevel=2)
        return getattr(sys.modules[f"reward.{module}"], new)

    return forward


def attribute(name: str) -> Any:
    """An old module as an attribute of `reward`. Raises AttributeError for any other name."""
    if name in MODULES:
        return importlib.import_module(f"reward.{name}")
    raise AttributeError(f"module 'reward' has no attribute {name!r}")
