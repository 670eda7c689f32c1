"""What of this Python's installation a sandbox shows besides the standard library."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import metadata

from reward.types import RewardError


@cache
def installed(names: Sequence[str]) -> list[str]:
    """The paths of everything that the distributions of some packages have installed; `names` are as an import says.

    Raises RewardError where one is not installed, or lies in a folder that it shares with other distributions.
    """
    if not names:
        return []
    owners = metadata.packages_distributions()
    return sorted({path for name in names for path in _paths(name, owners)})


def _paths(name: str, owners: Mapping[str, list[str]]) -> list[str]:
    theirs = set(owners.get(name, ()))
    if not theirs:
        raise RewardError(
            f"packages: no package {name!r} is installed in {sys.prefix}. Name packages as an import does "
            "(sklearn, not scikit-learn); the standard library needs no name"
        )
    if len(theirs) > 1:
        raise RewardError(
            f"packages: {name!r} is a folder that {', '.join(sorted(theirs))} share; none of them can be shown alone"
        )
    distribution = metadata.distribution(theirs.pop())
    tops = {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}
    shared = sorted(top for top in tops if len(set(owners.get(top, ()))) > 1)
    if shared:
        raise RewardError(
            f"packages: {name!r} shares the folder {shared[0]} with other packages and cannot be shown alone"
        )
    paths = [os.path.abspath(str(distribution.locate_file(top))) for top in tops]
    return [path for path in paths if os.path.exists(path)]
