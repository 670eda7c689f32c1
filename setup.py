"""Puts the data cards and the recipes, which are at the top of the repository, below `align` in a wheel; pyproject.toml has the rest."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithShippedFiles(build_py):
    """Copies modules, and what `align.shipped` looks for."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for name in ("data_cards", "recipes"):
                shutil.copytree(
                    name,
                    Path(self.build_lib) / "align" / "shipped_files" / name,
                    ignore=shutil.ignore_patterns("__pycache__"),
                    dirs_exist_ok=True,
                )


setup(cmdclass={"build_py": BuildWithShippedFiles})
