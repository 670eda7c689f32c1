"""The scripts beside the recipes are in no package: a test loads one by its path."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def load_script() -> Callable[[str], ModuleType]:
    def load(path: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(Path(path).stem, RECIPES / path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
