"""What the recipes of DeepSeek-V2 and -Lite say of themselves: the clusters in their headers hold them, by `align plan`."""

import re
import shlex
from pathlib import Path

import pytest

from align.cli import main

FILES = sorted(path for name in ("v2", "v2_lite") for path in Path("recipes", name).glob("*.yaml"))
COMMAND = re.compile(r"^#   align (plan .*)$", re.MULTILINE)


@pytest.mark.parametrize("file", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_cluster_of_a_header_holds_the_recipe(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = COMMAND.findall(file.read_text())
    assert commands
    for command in commands:
        assert main(shlex.split(command)) == 0, capsys.readouterr().err
        assert command.split()[1] == str(file)
