"""Data on the Hugging Face hub, which is a stand-in on this machine: what is read of it, and what is said where it cannot be."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from glob import glob
from pathlib import Path
from typing import Any

import pytest

from align.data.hub import has_pattern
from align.errors import UserError
from align.recipe import load_recipe
from align.recipe.options import is_on_hub

from .hub_server import COMMIT, GATED, hub

TOKEN = "hf_" + "x" * 20
READ = """
import json, sys
from align.data.cards import OwnSource
from align.data.loader import load_split
from align.data.own import own_card, read_user_file
from align.data.hub import has_pattern
from align.errors import UserError
for values in json.loads(sys.argv[1]):
    try:
        card = own_card(OwnSource.model_validate({"kind": "own", **values}))
        found = {split: load_split(card, split).examples for split in card.splits}
        rows = {split: len(examples) for split, examples in found.items()}
        asked = len(read_user_file(values["path"])) if list(values) == ["path"] else None
        print(json.dumps({"name": card.name, "rows": rows, "first": next(iter(found.values()))[0].id, "asked": asked}))
    except UserError as error:
        print(json.dumps({"error": str(error)}))
"""


FILES = ["top.jsonl", "data/a.jsonl", "data/test/deep/c.jsonl", "data/test/b.jsonl"]


def problems(start: int, end: int) -> bytes:
    return b"".join(json.dumps({"question": f"{n} + 1?", "answer": str(n)}).encode() + b"\n" for n in range(start, end))


DATA_SETS = {
    "org/plain": {"README.md": b"# Sums\n", "train.jsonl": problems(0, 50), "test.jsonl": problems(50, 60)},
    "org/several": {
        "README.md": b"---\nconfigs:\n- config_name: one\n  default: true\n  data_files:\n  - split: train_sft\n    path: data/one-*.jsonl\n"
        b"- config_name: two\n  data_files: two.jsonl\n---\n",
        "data/one-0.jsonl": problems(0, 30),
        "data/one-1.jsonl": problems(30, 60),
        "two.jsonl": problems(60, 100),
    },
}


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[str, list[str]]]:
    with hub(DATA_SETS) as served:
        yield served


def read(address: str, home: Path, *sources: dict[str, Any], **environment: str) -> tuple[list[dict[str, Any]], str]:
    """What is read of sources in a process with a token whose hub is at an address, and all that this says."""
    env = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_TOKEN": TOKEN} | environment
    command = [sys.executable, "-c", READ, json.dumps(sources)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()], done.stdout + done.stderr


def test_names_configurations_splits_and_files_of_the_hub_are_read_and_read_again_offline(
    address: tuple[str, list[str]], tmp_path: Path
) -> None:
    url, asked = address
    sources: list[dict[str, Any]] = [
        {"path": "org/plain"},
        {"path": "org/plain", "revision": COMMIT},
        {"path": "org/several", "hub_split": "train_sft"},
        {"path": "org/several", "config": "two"},
        {"path": "hf://datasets/org/plain/train.jsonl"},
        {"path": f"hf:/datasets/org/several@{COMMIT}/data/*.jsonl"},
        {"path": "org/plain", "splits": ["test"]},
    ]
    found, _ = read(url, tmp_path, *sources)
    assert [(one["name"], sum(one["rows"].values()), one["first"]) for one in found] == [
        ("plain", 60, "plain/train/1"),
        ("plain", 60, "plain/train/1"),
        ("several", 60, "several/one-0/1"),
        ("several", 40, "several/2"),
        ("train", 50, "train/1"),
        ("data", 60, "data/one-0/1"),
        ("plain", 10, "plain/1"),
    ]
    assert found[0]["rows"]["test"] == found[0]["asked"] == 10
    assert found[4]["asked"] == 50
    before = len(asked)
    assert read(url, tmp_path, *sources, HF_HUB_OFFLINE="1")[0] == found
    assert len(asked) == before


def test_what_the_hub_does_not_have_or_give_is_said_with_both_readings_of_a_name_and_without_the_token(
    address: tuple[str, list[str]], tmp_path: Path
) -> None:
    cases = [
        ({"path": "org/none"}, "there is none of this name, or it is private: that needs a token, given with HF_TOKEN"),
        ({"path": GATED}, "accept its terms on its page, and give a token with HF_TOKEN"),
        ({"path": "org/plain", "revision": "v9"}, "it has no such revision"),
        ({"path": "org/several"}, "no split 'train', only train_sft: say with data.hub_split which of them is read"),
        ({"path": "org/several", "hub_split": "x"}, "data.hub_split: org/several has no split 'x', only train_sft"),
        ({"path": "org/several", "config": "x"}, "data.config: BuilderConfig 'x' not found. Available: ['one', 'two']"),
        ({"path": "hf://datasets/org/plain/no.jsonl"}, "has no file of this name or pattern"),
    ]
    found, said = read(address[0], tmp_path, *(source for source, _ in cases))
    for one, (_, message) in zip(found, cases, strict=True):
        assert message in one["error"]
    assert f"org/none: no file or directory {Path('org/none').absolute()} exists, and" in found[0]["error"]
    assert TOKEN not in said
    [offline], _ = read(address[0], tmp_path, {"path": "org/none"}, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set, and the hub's cache on this machine does not have it" in offline["error"]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("data/*.jsonl", ["data/a.jsonl"]),
        ("data/**/*.jsonl", ["data/a.jsonl", "data/test/deep/c.jsonl", "data/test/b.jsonl"]),
        ("*.jsonl", ["top.jsonl"]),
        ("data/test/?.jsonl", ["data/test/b.jsonl"]),
        ("**", FILES),
    ],
)
def test_a_pattern_means_what_it_means_on_a_disk(pattern: str, found: list[str], tmp_path: Path) -> None:
    assert [file for file in FILES if has_pattern(file.split("/"), pattern.split("/"))] == found
    for file in FILES:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    on_disk = {str(Path(file).relative_to(tmp_path)) for file in glob(str(tmp_path / pattern), recursive=True)}
    assert {file for file in on_disk if (tmp_path / file).is_file()} == set(found)


def test_a_stream_fetches_the_files_that_it_has_come_to(address: tuple[str, list[str]], tmp_path: Path) -> None:
    url, asked = address
    before = len(asked)
    [found], _ = read(url, tmp_path, {"path": "hf://datasets/org/several/data/*.jsonl", "stream": True})
    assert sum(found["rows"].values()) == 60
    fetched = [one for one in asked[before:] if one.startswith("GET /datasets/") and "one-" in one]
    assert [one.rpartition("/")[2] for one in fetched] == ["one-0.jsonl", "one-1.jsonl"]


@pytest.mark.parametrize(
    ("path", "on_hub"),
    [
        ("org/name", True),
        ("org/name.v2", True),
        ("hf:/datasets/org/name/train.jsonl", True),
        ("data/chat.jsonl", False),
        ("data/chat.csv.gz", False),
        ("data/*.jsonl", False),
        ("/data/chat", False),
        ("../chat", False),
        ("chat", False),
        ("recipes/nano", False),
    ],
)
def test_a_name_of_two_parts_without_a_suffix_is_the_hub_s_unless_it_is_there(path: str, on_hub: bool) -> None:
    assert is_on_hub(path) is on_hub


def test_a_mistyped_path_is_told_as_before(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.path names data/chat\.jsonl, which does not exist"):
        load_recipe(Path("recipes/nano/grpo.yaml"), ["data={path: data/chat.jsonl}"])
