"""A run directory as data: its stages in the order in which they ran, each with what it left behind."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

import yaml

from align.errors import UserError
from align.run import RunDirectory, read_status
from align.run.directory import LAYOUT

Record = Mapping[str, Any]
SAMPLES_NAME = re.compile(r"step_(\d+)\.parquet")


@dataclass(frozen=True, slots=True)
class Stage:
    """One run of one stage. `label` tells it from the others of the run; `remarks` say what was left out in reading."""

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
        """The table of completions of the evaluation `name`, or None where there is none."""
        file = RunDirectory(self.path).evaluations_directory / f"{name}.parquet"
        # A name out of a file must not lead out of the directory.
        return file if file.name == f"{name}.parquet" and file.is_file() else None

    @property
    def policy(self) -> Path:
        """Where the policy came from with which the stage began."""
        return Path(str(_mapping(self.recipe.get("model")).get("path"))).absolute()

    def model_directories(self, whole_run: Path) -> list[Path]:
        """The directories that may hold this stage's policy, its configuration and tokenizer; the likeliest first."""
        places = [run.final_directory for run in (RunDirectory(self.path), RunDirectory(whole_run))]
        places += [run.initial_directory for run in (RunDirectory(self.path), RunDirectory(whole_run))]
        named = _mapping(self.recipe.get("model")).get("path")
        if isinstance(named, str):
            places.append(Path(named).expanduser())
        return [place for place in dict.fromkeys(places) if place.is_dir()]


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A whole run: its own stage comes after those of the runs inside it, as it did in time."""

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


def read_run(path: Path) -> RunRecord:
    """Read the run in `path` and the runs inside it.

    A last line that was cut off in writing is left out with a remark. Raises UserError, with the file and line, for
    any other damage, and when `path` holds no run.
    """
    root = path.expanduser().absolute()
    if read_status(root) is None:
        raise UserError(_no_run(root))
    *inside, whole = _stages(root, root)
    if any(stage.label == whole.label for stage in inside):
        whole = replace(whole, label=f"{whole.label} (whole run)")
    return RunRecord(root, [*inside, whole])


def number(value: Any) -> float | None:
    """`value` as a float where it is a number (also one that JSON wrote as "nan" or "inf"), else None."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float) or value in ("nan", "inf", "-inf"):
        return float(value)
    return None


def finite(value: Any) -> float | None:
    """`value` as a float where it is a finite number, else None."""
    found = number(value)
    return found if found is not None and isfinite(found) else None


def read_columns(path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a Parquet table with those of `columns` that it has. Raises UserError when it cannot be read."""
    table = read_table(path)
    rows: list[dict[str, Any]] = table.select([name for name in columns if name in table.column_names]).to_pylist()
    return rows


def read_table(path: Path) -> Any:
    """A Parquet file as a pyarrow table. Raises UserError when it cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            return file.read()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} is not a readable Parquet file: {error}. Move it away to leave it out") from error


def read_records(path: Path) -> tuple[list[Record], str | None]:
    """The objects of a file of JSON lines, and a remark where its last line was cut off in writing and left out.

    A file that is not there has none. Raises UserError with file and line for any other line that is no JSON object.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return [], None
    records: list[Record] = []
    lines = content.split(b"\n")
    for count, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode())
        except ValueError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif count == len(lines):
            return records, f"{path.name}, line {count}: cut off in writing, and left out here"
        else:
            raise UserError(
                f"{path}, line {count}: not one JSON object, as every line of this file must be. "
                "Mend or remove the line, then ask for the report again"
            )
    return records, None


def _stages(directory: Path, root: Path) -> list[Stage]:
    """The stages below `directory`, then its own."""
    inside = [
        (str(status.get("started")), entry)
        for entry in directory.iterdir()
        if entry.name not in LAYOUT and entry.is_dir() and not entry.is_symlink()
        if (status := read_status(entry)) is not None
    ]
    earlier = [stage for _, entry in sorted(inside) for stage in _stages(entry, root)]
    return [*earlier, _stage(directory, root)]


def _stage(directory: Path, root: Path) -> Stage:
    run = RunDirectory(directory)
    status = read_status(directory) or {}
    recipe = _recipe(run.recipe_file)
    files = (run.metrics_file, run.events_file, run.evaluations_file)
    (metrics, events, evaluations), remarks = zip(*map(read_records, files), strict=True)
    own = status.get("stage") or recipe.get("stage") or directory.name
    return Stage(
        label=str(own) if directory == root else directory.relative_to(root).as_posix(),
        path=directory,
        status=status,
        recipe=recipe,
        environment=_environment(run.environment_file),
        metrics=metrics,
        events=events,
        evaluations=evaluations,
        samples=_samples(run.samples_directory),
        remarks=[remark for remark in remarks if remark],
    )


def _samples(directory: Path) -> dict[int, Path]:
    if not directory.is_dir():
        return {}
    found = {int(match[1]): file for file in directory.iterdir() if (match := SAMPLES_NAME.fullmatch(file.name))}
    return dict(sorted(found.items()))


def _recipe(path: Path) -> Record:
    try:
        return _mapping(yaml.safe_load(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None


def _environment(path: Path) -> Record:
    try:
        return _mapping(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None


def _mapping(value: Any) -> Record:
    return value if isinstance(value, dict) else {}


def _no_run(root: Path) -> str:
    if not root.exists():
        return f"{root} does not exist; give the directory of a run, such as runs/NAME"
    if not root.is_dir():
        return f"{root} is a file; give the directory of a run, such as runs/NAME"
    runs = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and read_status(entry) is not None)
    within = f". It holds runs, though: give one of {', '.join(runs[:5])}" if runs else ""
    return f"{root} is no run directory: it has no status.json that a run wrote{within}"
