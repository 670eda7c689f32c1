"""The figures that the DeepSeek-V2 report printed, where a run trains a model of that report."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from align.report.read import RunRecord, Stage

# They share sizes with a model of the report, and are others.
OTHER_MODELS = re.compile(r"coder|v2\.5|vl2", re.I)


@dataclass(frozen=True, slots=True)
class Published:
    """What was printed for `model`: `figures` by column (base, Chat (SFT), ...) and benchmark."""

    model: str
    source: str
    url: str
    tables: str
    figures: Mapping[str, Mapping[str, float]]

    @property
    def benchmarks(self) -> list[str]:
        return list(dict.fromkeys(name for column in reversed(list(self.figures.values())) for name in column))


def published_figures(run: RunRecord) -> Published | None:
    """The printed figures of the run's model, or None where it is no model of the report.

    The model is known by the sizes in a config.json of the run or of the recipe's model.path; where there is none, by
    the name in model.path.
    """
    for stage in reversed(run.stages):
        name = str(_mapping(stage.recipe.get("model")).get("path", ""))
        if not OTHER_MODELS.search(name):
            config = _config(stage, run.path)
            for model in _data()["models"]:
                if _fits(config, model["sizes"]) if config else _is_called(name, model["name"]):
                    data = _data()
                    return Published(model["name"], data["source"], data["url"], model["tables"], model["figures"])
    return None


@cache
def _data() -> dict[str, Any]:
    text = resources.files("align.report").joinpath("published.yaml").read_text(encoding="utf-8")
    data: dict[str, Any] = yaml.safe_load(text)
    return data


def _config(stage: Stage, whole_run: Path) -> Mapping[str, Any] | None:
    for directory in stage.model_directories(whole_run):
        try:
            return _mapping(json.loads((directory / "config.json").read_text(encoding="utf-8")))
        except (OSError, ValueError):
            continue
    return None


def _fits(config: Mapping[str, Any], sizes: Mapping[str, int]) -> bool:
    kind = config.get("model_type") == "deepseek_v2"
    known_as_other = OTHER_MODELS.search(str(config.get("_name_or_path", "")))
    return kind and not known_as_other and all(config.get(key) == value for key, value in sizes.items())


def _is_called(name: str, model: str) -> bool:
    return re.fullmatch(rf"{re.escape(model)}(-chat)?", name.rstrip("/").rpartition("/")[2], re.I) is not None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
