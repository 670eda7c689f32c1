"""Runs in trackio, Weights & Biases and MLflow, by their own libraries, which read their own environment variables."""

import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import psutil
import yaml

from align.errors import UserError

Ending = Literal["finished", "failed", "interrupted"]
Row = Mapping[str, str | int | float | None]
STEP = "step"
FINISH_TIMEOUT_S = 60.0
"""How long the end of a run waits for a tracker that is still sending."""
START_TIMEOUT_S = 45.0
"""How long a tracker has to answer at all before the end of a run waits for it no more."""


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """A run as trackers see it. `recipe` is ready for JSON and has no secrets; local files of a library go to `directory`."""

    name: str
    recipe: Mapping[str, Any]
    directory: Path


class Tracker(Protocol):
    """A run in a tracker. Every method may raise what its library raises, and may take long."""

    def start(self, run: TrackedRun, run_id: str | None) -> str:
        """Begin a run and return its id; with `run_id`, go on in that run."""

    def scalars(self, step: int, values: Mapping[str, float], time: float) -> None:
        """Log what was measured in a step at `time`, in seconds since 1970."""

    def table(self, step: int, name: str, rows: Sequence[Row]) -> None: ...

    def finish(self, ending: Ending) -> None:
        """End the run and wait until it has everything."""

    def abandon(self) -> None:
        """Leave nothing behind that the end of the process would wait for. May be called from another thread, and again."""


class Trackio:
    """A run in trackio's SQLite file, or in a private Space where TRACKIO_SPACE_ID names one. Its id is its name."""

    def __init__(self, project: str) -> None:
        self._project = project
        self._run: Any = None

    def start(self, run: TrackedRun, run_id: str | None) -> str:
        import trackio

        run_id = run_id or f"{run.name}-{secrets.token_hex(3)}"
        self._run = trackio.init(
            self._project, name=run_id, config=dict(run.recipe), resume="allow", private=True, embed=False
        )
        return run_id

    def scalars(self, step: int, values: Mapping[str, float], time: float) -> None:
        self._run.log(dict(values), step=step)

    def table(self, step: int, name: str, rows: Sequence[Row]) -> None:
        import trackio

        self._run.log({name: trackio.Table(data=[dict(row) for row in rows])}, step=step)

    def finish(self, ending: Ending) -> None:
        self._run.finish()

    def abandon(self) -> None:
        """Nothing to do: its thread is a daemon, and ends with the process."""


class Wandb:
    """A run in Weights & Biases; in files below the run where WANDB_MODE is offline. The command line, code and terminal are not sent."""

    def __init__(self, project: str) -> None:
        self._project = project
        self._run: Any = None

    def start(self, run: TrackedRun, run_id: str | None) -> str:
        import wandb

        settings = wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            x_disable_meta=True,
            x_save_requirements=False,
            finish_timeout=FINISH_TIMEOUT_S - 10,
            finish_timeout_raises=True,
        )
        run.directory.mkdir(exist_ok=True)
        self._run = wandb.init(
            project=self._project,
            name=run.name,
            id=run_id or secrets.token_hex(4),
            resume="allow",
            config=dict(run.recipe),
            dir=os.environ.get("WANDB_DIR") or run.directory,
            settings=settings,
        )
        # W&B's own steps may not go back, and an evaluation comes after the step that it is of.
        self._run.define_metric("*", step_metric=STEP)
        return str(self._run.id)

    def scalars(self, step: int, values: Mapping[str, float], time: float) -> None:
        self._run.log({**values, STEP: step})

    def table(self, step: int, name: str, rows: Sequence[Row]) -> None:
        import wandb

        columns = list(dict.fromkeys(column for row in rows for column in row))
        data = [[row.get(column) for column in columns] for row in rows]
        table = wandb.Table(columns=columns, data=data, allow_mixed_types=True)
        self._run.log({name: table, STEP: step})

    def finish(self, ending: Ending) -> None:
        self._run.finish(exit_code=int(ending != "finished"))

    def abandon(self) -> None:
        import wandb

        # At the end of this process the library would wait for its own one, as long again as `finish` has. What that has is on the disk.
        for child in psutil.Process().children():
            if child.name() == "wandb-core":
                child.kill()
        with suppress(Exception):
            wandb.teardown()


def check_wandb() -> None:
    """Raise UserError where W&B is online and has no API key: it would ask for one at the terminal."""
    import wandb

    if wandb.setup().settings.mode not in ("online", "shared"):
        return
    try:
        known = wandb.login(prompt=False, verify=False)
    except TypeError:
        raise UserError("trackers: this wandb is too old: `pip install --upgrade wandb`") from None
    if not known:
        raise UserError(
            "trackers: wandb has no API key: run `wandb login`, or set WANDB_API_KEY; WANDB_MODE=offline keeps the run in files, for "
            "`wandb sync`"
        )


class Mlflow:
    """A run in the MLflow of MLFLOW_TRACKING_URI; in a SQLite file where that is not set, as MLflow has it."""

    STATUS: Mapping[Ending, str] = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
    PARAMS_AT_ONCE = 100
    LONGEST_PARAM = 500

    def __init__(self, project: str) -> None:
        self._project = project
        self._client: Any = None
        self._run_id = ""

    def start(self, run: TrackedRun, run_id: str | None) -> str:
        from mlflow import MlflowClient

        self._client = MlflowClient()
        if run_id is not None:
            self._client.update_run(run_id, status="RUNNING")
            self._run_id = run_id
            return run_id
        experiment = self._client.get_experiment_by_name(self._project)
        id_there = experiment.experiment_id if experiment else self._client.create_experiment(self._project)
        self._run_id = str(self._client.create_run(id_there, run_name=run.name).info.run_id)
        self._log_recipe(run.recipe)
        return self._run_id

    def scalars(self, step: int, values: Mapping[str, float], time: float) -> None:
        from mlflow.entities import Metric

        milliseconds = int(time * 1000)
        metrics = [Metric(mlflow_name(name), value, milliseconds, step) for name, value in values.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def table(self, step: int, name: str, rows: Sequence[Row]) -> None:
        columns = dict.fromkeys(column for row in rows for column in row)
        data = {column: [row.get(column) for row in rows] for column in columns}
        self._client.log_table(self._run_id, data, f"{mlflow_name(name)}/step_{step:05d}.json")

    def finish(self, ending: Ending) -> None:
        self._client.set_terminated(self._run_id, self.STATUS[ending])

    def abandon(self) -> None:
        """It has nothing but requests that are under way."""

    def _log_recipe(self, recipe: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        self._client.log_text(self._run_id, yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), "recipe.yaml")
        params = [Param(mlflow_name(key), str(value)[: self.LONGEST_PARAM]) for key, value in _leaves(recipe, "")]
        for place in range(0, len(params), self.PARAMS_AT_ONCE):
            self._client.log_batch(self._run_id, params=params[place : place + self.PARAMS_AT_ONCE])


def mlflow_name(name: str) -> str:
    """A name with _ for what MLflow allows in no name, such as the @ of pass@4."""
    return re.sub(r"[^\w\-./ :]", "_", name)


def _leaves(value: Any, at: str) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything below `value` that holds nothing else."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{at}{key}.")
    elif isinstance(value, list) and any(isinstance(inner, Mapping) for inner in value):
        for place, inner in enumerate(value):
            yield from _leaves(inner, f"{at}{place}.")
    else:
        yield at.removesuffix("."), value


LIBRARIES: dict[str, Callable[[str], Tracker]] = {"trackio": Trackio, "wandb": Wandb, "mlflow": Mlflow}
