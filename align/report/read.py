"""A run directory as data: its stages in the order in which they ran, each with the files that it wrote."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

import yaml

from align.errors import UserError
from align.run import RunDirectory, read_status
from align.run.directory import LAYOUT
from align.run.files import read_jsonl_lines, read_parquet, without_secrets_in

Record = Mapping[str, Any]
SAMPLES_NAME = re.compile(r"step_(\d+)\.parquet")
# Columns of samples and metrics as earlier versions wrote them, and what they are called now.
RENAMED = {
    "answer": "ground_truth",
    "sampler_log_probs": "log_probs",
    "uniform_groups": "zero_variance_groups",
}


@dataclass(frozen=True, slots=True)
class Stage:
    """One run of one stage. `label` is unique within the run; `remarks` say which damaged lines were skipped."""

    label: str
    path: Path
    status: Record
    recipe: Record
    environment: Record
    metrics: Sequence[Record]
    events: Sequence[Record]
    evaluations: Sequence[Record]
    samples: Mapping[int, Path]
    remarks: Sequence[str]

    def evaluation_file(self, name: str) -> Path | None:
        """The table of completions of the evaluation `name`, or None if it does not exist."""
        file = RunDirectory(self.path).evaluations_directory / f"{name}.parquet"
        # A name read from a file must not lead out of the directory.
        return file if file.name == f"{name}.parquet" and file.is_file() else None

    @property
    def model_path(self) -> str:
        """The path of the policy that the stage started from; "" if the recipe has none."""
        return str(at(self.recipe, "model", "path") or "")

    def model_directories(self, whole_run: Path) -> list[Path]:
        """The existing directories that may hold the policy's configuration and tokenizer, the likeliest first."""
        runs = (RunDirectory(self.path), RunDirectory(whole_run))
        places = [*(run.final_directory for run in runs), *(run.initial_directory for run in runs)]
        places += [Path(self.model_path).expanduser()] if self.model_path else []
        return [place for place in dict.fromkeys(places) if place.is_dir()]


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A whole run; its own stage is the last, after those of the runs inside it."""

    path: Path
    stages: Sequence[Stage]

    @property
    def name(self) -> str:
        named = self.whole.recipe.get("name")
        return named if isinstance(named, str) else self.path.name

    @property
    def whole(self) -> Stage:
        """The run's own stage."""
        return self.stages[-1]

    def title_of(self, stage: Stage, evaluation: str) -> str:
        """What an evaluation is called: with its stage where there are several."""
        return f"{stage.label}: {evaluation}" if len(self.stages) > 1 else evaluation


def read_run(path: Path) -> RunRecord:
    """Read the run in `path` and the runs inside it.

    A last line that was cut off while it was written is skipped with a remark. Raises UserError, with the file and
    line, for any other damage, and when `path` holds no run.
    """
    root = path.expanduser().absolute()
    if read_status(root) is None:
        raise UserError(_no_run(root))
    *inside, whole = [_stage(directory, root) for directory in _runs(root)]
    if any(stage.label == whole.label for stage in inside):
        whole = replace(whole, label=f"{whole.label} (whole run)")
    return RunRecord(root, [*inside, whole])


def at(value: Any, *keys: str) -> Any:
    """The value at nested keys, or None where a mapping lacks one."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def number(value: Any) -> float | None:
    """`value` as a float if it is a number or one that JSON wrote as "nan" or "inf"; else None."""
    if isinstance(value, bool):
        return None
    return float(value) if isinstance(value, int | float) or value in ("nan", "inf", "-inf") else None


def finite(value: Any) -> float | None:
    """`value` as a float if it is a finite number, else None."""
    found = number(value)
    return found if found is not None and isfinite(found) else None


def read_table(path: Path, columns: Iterable[str]) -> Any:
    """The pyarrow table of those of `columns` that a Parquet file has, under their present names.

    Raises UserError when it cannot be read.
    """
    former = {new: old for old, new in RENAMED.items()}
    names = [name for column in columns for name in (column, former.get(column)) if name]
    table = read_parquet(path, names, ". Move it away to leave it out")
    return table.rename_columns([RENAMED.get(name, name) for name in table.column_names])


def read_records(path: Path, remarks: list[str]) -> list[Record]:
    """The objects of a JSON Lines file, under their present names; a missing file has none.

    A last line that was cut off while it was written is skipped, and told in `remarks`. Raises UserError with file and line for
    any other line that is not a JSON object.
    """
    if not path.exists():
        return []
    return [{RENAMED.get(key, key): value for key, value in row.items()} for _, row in read_jsonl_lines(path, remarks)]


def _runs(directory: Path) -> list[Path]:
    """The runs below `directory`, in the order in which they started, then itself."""
    inside = [
        (str(status.get("started")), entry)
        for entry in directory.iterdir()
        if entry.name not in LAYOUT and entry.is_dir() and not entry.is_symlink()
        if (status := read_status(entry)) is not None
    ]
    return [*(run for _, entry in sorted(inside) for run in _runs(entry)), directory]


def fingerprint(path: Path) -> str:
    """A text that changes whenever something is written that `read_run` reads of the run in `path`."""
    root = path.expanduser().absolute()
    seen = []
    for directory in _runs(root) if root.is_dir() else ():
        run = RunDirectory(directory)
        lines = (run.metrics_file, run.events_file, run.evaluations_file)
        for file in (run.status_file, run.recipe_file, *lines, run.samples_directory, run.evaluations_directory):
            if file.exists():
                found = file.stat()
                seen.append((str(file), found.st_mtime_ns, found.st_size, found.st_ino))
    return hashlib.sha256(repr(seen).encode()).hexdigest()


def _stage(directory: Path, root: Path) -> Stage:
    run = RunDirectory(directory)
    status, recipe = read_status(directory) or {}, _read_mapping(run.recipe_file)
    remarks: list[str] = []
    own = status.get("stage") or recipe.get("stage") or directory.name
    samples = {
        int(match[1]): file for file in run.samples_directory.glob("*") if (match := SAMPLES_NAME.fullmatch(file.name))
    }
    return Stage(
        label=str(own) if directory == root else directory.relative_to(root).as_posix(),
        path=directory,
        status=status,
        recipe=without_secrets_in(recipe),
        environment=_read_mapping(run.environment_file),
        metrics=read_records(run.metrics_file, remarks),
        events=read_records(run.events_file, remarks),
        evaluations=read_records(run.evaluations_file, remarks),
        samples=dict(sorted(samples.items())),
        remarks=remarks,
    )


def _read_mapping(path: Path) -> Record:
    """The mapping in a YAML or JSON file; empty if the file is missing or holds something else."""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except FileNotFoundError:
        return {}
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not valid {'JSON' if path.suffix == '.json' else 'YAML'}: {error}") from None
    return content if isinstance(content, dict) else {}


def _no_run(root: Path) -> str:
    if not root.exists():
        return f"{root} does not exist; give the directory of a run, such as runs/NAME"
    if not root.is_dir():
        return f"{root} is a file; give the directory of a run, such as runs/NAME"
    runs = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and read_status(entry) is not None)
    within = f". It holds runs, though: give one of {', '.join(runs[:5])}" if runs else ""
    return f"{root} is no run directory: it has no status.json that a run wrote{within}"
