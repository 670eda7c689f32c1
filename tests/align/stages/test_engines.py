"""New weights travel as the recipe says, and what a killed run left of them is removed."""

from pathlib import Path

from align.config import GrpoRecipe, load_recipe
from align.stages.engines import transport_of
from rollout import Directory, ObjectStore


def recipe(*overrides: str) -> GrpoRecipe:
    loaded = load_recipe(Path("recipes/nano/grpo.yaml"), ["init_from=null", *overrides])
    assert isinstance(loaded, GrpoRecipe)
    return loaded


def test_through_ray_unless_the_recipe_says_otherwise(tmp_path: Path) -> None:
    assert transport_of(recipe("weights.bucket_mb=0.5"), tmp_path) == ObjectStore(2**19)


def test_files_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    directory = tmp_path / "weights"
    directory.mkdir()
    (directory / "left.safetensors").touch()
    assert transport_of(recipe("weights.transport=directory"), directory) == Directory(directory, 2**28)
    assert not directory.exists()
