"""Data sets of the Hugging Face hub: which of their files are read, and where they are once they are here.

`datasets` says which files a configuration and a split have, and `huggingface_hub` fetches them into its cache; they are then read as local
files are. Where HF_HUB_OFFLINE is set, only what the cache has is read.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from align.errors import UserError
from align.recipe.options import HUB_FILE
from align.run.files import redacted

DOCS = ("README.md", "*.md")


@lru_cache(maxsize=8)
def hub_files(path: str, config: str | None, revision: str | None, split: str | None) -> Mapping[str, Sequence[Path]]:
    """The files of each split of `org/name`, or of `split` alone as "train"; those of `hf://datasets/org/name/FILE` as "train".

    Raises UserError where there are none, and where the hub refuses or cannot be reached.
    """
    if file := HUB_FILE.fullmatch(path):
        name, pinned, pattern = file.groups()
        directory = _fetched(name, pinned or revision, [pattern])
        if found := sorted(one for one in directory.glob(pattern) if one.is_file()):
            return {"train": found}
        raise UserError(f"{path}: the data set {name} of the hub has no file of this name or pattern")
    splits = _splits(path, config, revision)
    if split is None:
        return splits
    if split not in splits:
        raise UserError(f"data.hub_split: {path} has no split {split!r}, only {', '.join(splits)}")
    return {"train": splits[split]}


def _splits(name: str, config: str | None, revision: str | None) -> Mapping[str, Sequence[Path]]:
    from datasets import load_dataset_builder
    from huggingface_hub.constants import HF_HUB_OFFLINE

    # What the cache has is read like a directory, since `datasets` itself finds there only what it has converted.
    place = str(_fetched(name, revision, [])) if HF_HUB_OFFLINE else name
    with _told(name):
        given = {} if HF_HUB_OFFLINE else {"revision": revision}
        files = load_dataset_builder(place, config, **given).config.data_files
    if not files:
        raise UserError(f"{name}: the data set has no files that can be read")
    start = re.compile(rf"hf://datasets/{re.escape(name)}(@[^/]+)?/|{re.escape(place)}/")
    named = {str(split): [start.sub("", str(one), count=1) for one in found] for split, found in files.items()}
    directory = _fetched(name, revision, [one for found in named.values() for one in found])
    return {split: [directory / one for one in found] for split, found in named.items()}


def _fetched(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The directory of the hub's cache with those files of a data set that have such names."""
    from huggingface_hub import snapshot_download

    with _told(name):
        return Path(snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=[*patterns, *DOCS]))


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
        if any(isinstance(cause, GatedRepoError) for cause in causes) or "gated" in str(error):
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
        raise UserError(f"{name}: {local}the data set of the Hugging Face hub cannot be read: {why}") from error
