"""Files of rows, and cards of them, for tests of what reads data."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

Rows = Iterable[dict[str, Any]]


def write_rows(file: Path, rows: Iterable[dict[str, Any] | str]) -> Path:
    """JSON lines; a row that is a text is a line as it stands."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return file


def chats(count: int) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"It is {n}."}]}
        for n in range(count)
    ]


def problems(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"question": f"What is {n} + 1?", "answer": str(n + 1), "unit": "cm"} for n in range(start, start + count)]


def pairs(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"Say {n}.", "chosen": f"{n}.", "rejected": "No."} for n in range(count)]


def front_of(source: Mapping[str, Any], **keys: Any) -> dict[str, Any]:
    """The front matter of a card of a source: what is evaluated on is held out. `keys` are put over it."""
    splits = list(source.get("splits", ()))
    held_out = [split for split in ("validation", "test") if split in splits]
    return {
        "name": "mine",
        "title": "Mine",
        "source": dict(source),
        "licence": "CC0",
        "stages": ["sft", "grpo", "eval"],
        "domain": "arithmetic",
        "splits": dict.fromkeys(splits, "some"),
        "decontamination": {"against": held_out, "why": "so"},
    } | keys


def write_card(file: Path, source: Mapping[str, Any], **keys: Any) -> Path:
    front = front_of(source, **({"name": file.stem} | keys))
    file.write_text(f"---\n{yaml.safe_dump(front)}---\n\n# Mine\n", encoding="utf-8")
    return file
