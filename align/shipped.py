"""The data cards and the recipes that come with the package."""

from pathlib import Path

_INSTALLED = Path(__file__).parent / "shipped_files"
SHIPPED = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[1]
"""Holds data_cards/ and recipes/: the repository, or for an installed package a directory of it."""
CARDS = SHIPPED / "data_cards"
NAMES = ("data_cards", "recipes")


def found(path: Path) -> Path:
    """`path`, or where it is relative and not there, what comes with the package by this name, such as recipes/nano/grpo.yaml."""
    if not path.parts or path.parts[0] not in NAMES or path.exists():
        return path
    ours = SHIPPED / path
    return ours if ours.exists() else path
