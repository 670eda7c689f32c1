"""Data sets of the Hugging Face hub: which of their files are read, and where they are once they are here.

`datasets` says which files a configuration and a split have, and `huggingface_hub` fetches them into its cache; they are then read as local
files are. Where HF_HUB_OFFLINE is set, only what the cache has is read.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path

from align.data.files import suffix_of
from align.data.types import SplitName
from align.errors import UserError
from align.recipe.options import HUB_FILE
from align.run.files import redacted

CACHED = re.compile(r".*/datasets--([^/]+?)--([^/]+)/snapshots/([^/]+)/(.+)")
"""Where `huggingface_hub` has a file of a data set: whose, its name, the commit, the file."""


@lru_cache(maxsize=8)
def hub_files(
    path: str,
    config: str | None,
    revision: str | None,
    hub_split: str | None,
    splits: tuple[SplitName, ...],
    in_turn: bool = False,
) -> dict[SplitName, list[Path]]:
    """The files of each of `splits` that a data set of the hub has.

    `path` is `org/name`, of which `hub_split`, or an only split of another name, stands for the first of `splits`; or it is
    `hf://datasets/org/name/FILE`, whose files are those of the first of `splits`. All are fetched, or where they are read `in_turn` the first of
    each split, and the others by `fetched`. Raises UserError where there are none, and where the hub refuses or cannot be reached.
    """
    if file := HUB_FILE.fullmatch(path):
        name, pinned, pattern = file.groups()
        revision = pinned or revision
        names = {splits[0]: _names(name, revision, pattern)}
        if not names[splits[0]]:
            raise UserError(
                f"{path}: the data set {name} of the hub has no file of this name or pattern, in which * stays within a directory, and **/ is any number of them"
            )
    else:
        name, there = path, _names_of_splits(path, config, revision)
        if hub_split is not None and hub_split not in there:
            raise UserError(f"data.hub_split: {path} has no split {hub_split!r}, only {', '.join(there)}")
        names = {split: there[split] for split in splits if split in there}
        if hub_split is not None or len(splits) == len(there) == 1:
            names = {splits[0]: there[hub_split or next(iter(there))]}
        if splits[0] not in names:
            raise UserError(
                f"{path}: the data set has no split {splits[0]!r}, only {', '.join(there)}: say with data.hub_split which of them is read"
            )
    for one in (one for found in names.values() for one in found):
        suffix_of(Path(one))
    directory = _fetched(name, revision, [one for found in names.values() for one in found[: 1 if in_turn else None]])
    return {split: [directory / one for one in found] for split, found in names.items()}


def fetched(path: Path) -> Path:
    """`path`, once it is there: a file of a data set that is not in the hub's cache yet is fetched."""
    if path.exists() or not (of := CACHED.fullmatch(str(path))):
        return path
    from huggingface_hub import hf_hub_download

    owner, name, commit, file = of.groups()
    with _told(f"{owner}/{name}"):
        return Path(hf_hub_download(f"{owner}/{name}", file, repo_type="dataset", revision=commit))


def _names(name: str, revision: str | None, pattern: str) -> list[str]:
    """The files of a data set whose names have a pattern."""
    from huggingface_hub import list_repo_files
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        directory = _fetched(name, revision, [])
        there = [str(file.relative_to(directory)) for file in directory.rglob("*") if file.is_file()]
    else:
        with _told(name):
            there = list_repo_files(name, repo_type="dataset", revision=revision)
    return sorted(file for file in there if has_pattern(file.split("/"), pattern.split("/")))


def has_pattern(parts: Sequence[str], patterns: Sequence[str]) -> bool:
    """Whether a path has a pattern, as on a disk: `*` stays within a directory, and `**` stands for any number of them."""
    if not patterns:
        return not parts
    if patterns[0] == "**" and has_pattern(parts, patterns[1:]):
        return True
    rest = patterns if patterns[0] == "**" else patterns[1:]
    return bool(parts) and fnmatch(parts[0], patterns[0]) and has_pattern(parts[1:], rest)


def _names_of_splits(name: str, config: str | None, revision: str | None) -> dict[str, list[str]]:
    """The files of each split that a configuration of a data set has."""
    from datasets import load_dataset_builder
    from huggingface_hub.constants import HF_HUB_OFFLINE

    # Also the quick way to learn that the hub cannot be reached, which `datasets` tries for half a minute.
    directory = _fetched(name, revision, [])
    # What the cache has is read like a directory, since `datasets` itself finds there only what it has converted.
    place = str(directory) if HF_HUB_OFFLINE else name
    with _told(name):
        builder = load_dataset_builder(place, config, **({} if HF_HUB_OFFLINE else {"revision": revision}))
    files = builder.config.data_files or {}
    start = re.compile(rf"hf://datasets/{re.escape(name)}(@[^/]+)?/|{re.escape(place)}/")
    return {str(split): [start.sub("", str(one), count=1) for one in found] for split, found in files.items()}


def _fetched(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The directory of the hub's cache with those files of a data set that have such names."""
    from huggingface_hub import snapshot_download

    with _told(name):
        return Path(
            snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=[*patterns, "README.md"])
        )


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Raise UserError for what the hub's clients raise."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except Exception as error:  # they raise their own, the HTTP library's and built-in ones
        causes = [error, error.__cause__, error.__context__]
        reason = redacted(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
        if "BuilderConfig" in reason or "Config name is missing" in reason:
            why = f"data.config: {str(error).strip()}"
        elif any(isinstance(cause, GatedRepoError) for cause in causes) or "is a gated" in str(error):
            why = "its owner must let you in: accept its terms on its page, and give a token with HF_TOKEN or `hf auth login`"
        elif constants.HF_HUB_OFFLINE:
            why = "HF_HUB_OFFLINE is set, and the hub's cache on this machine does not have it: unset that, or give a local file"
        elif any(isinstance(cause, RevisionNotFoundError) for cause in causes):
            why = "it has no such revision"
        elif any(isinstance(cause, RepositoryNotFoundError | DatasetNotFoundError) for cause in causes):
            why = "there is none of this name, or it is private: that needs a token, given with HF_TOKEN or `hf auth login`"
        else:
            why = f"{reason}. Where the hub cannot be reached, give a local file"
        local = "" if HUB_FILE.fullmatch(name) else f"no file or directory {Path(name).absolute()} exists, and "
        raise UserError(
            f"{name}: {local}the data set of this name on the Hugging Face hub cannot be read: {why}"
        ) from error
