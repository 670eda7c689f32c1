"""A run as a model card: the README.md that the Hugging Face hub reads beside the weights of `final/`."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData, constants

from align.data.cards import DataCard, HubSource, load_card
from align.errors import UserError
from align.model.reward_model import is_usage, usage
from align.recipe.options import HUB_FILE, is_on_hub
from align.report.curves import Series, metric_series
from align.report.evaluations import Evaluation, column_groups, compared_evaluations
from align.report.read import RunRecord, Stage, read_run
from align.run import RunDirectory, read_status
from align.run.files import without_secrets_in
from align.statistics import wilson_interval

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
UNKNOWN = "unknown"
HUB_TIMEOUT_S = 10.0
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
NON_COMMERCIAL = re.compile(r"non-?\s?commercial|\bNC\b|research[- ]only", re.IGNORECASE)
SEAL = re.compile(r"\n<!-- align publish: ([0-9a-f]{64}) -->\n\Z")
MACHINE = ("run", "machine", "trackers", "save_every", "keep_checkpoints")
"""Keys of a recipe that say nothing of what was trained, and may name places of the machine."""
SHOWN = (
    "loss",
    "validation_loss",
    "reward",
    "accuracy",
    "validation_accuracy",
    "pair_accuracy",
    "validation_pair_accuracy",
    "margin",
    "length",
    "kl",
    "entropy",
    "learning_rate",
)
COLUMNS = 5
EVALUATED = ("right answers", "sampled", "rates", "preference")
NO_SHARES = re.compile(r"preference/(accuracy_(low|high)|difference|calibration_error)")


@dataclass(frozen=True, slots=True)
class Source:
    """Something that a model was made of, with its licence; `hub` is its name on the hub, "" where it has none.

    `named` says that the licence is none of the hub's own, but one with a name, whose text is at `link` where that is known.
    """

    title: str
    licence: str
    use: str = ""
    homepage: str = ""
    hub: str = ""
    named: bool = False
    link: str = ""

    @property
    def is_non_commercial(self) -> bool:
        return bool(NON_COMMERCIAL.search(self.licence))


def model_card(run: RunRecord, name: str) -> str:
    """The card of what a run has trained, to be published as `name`; it ends in a seal by which `is_edited` knows a changed one.

    Raises UserError for a data card that cannot be read.
    """
    stages = lineage(run)
    data, base = data_of(stages), base_of(stages[0])
    evaluations = [each for each in compared_evaluations(run) if each.stage is run.whole]
    teachers = teachers_of(stages)
    made_of = [*([base] if base else []), *teachers, *data]
    licence = licence_of(made_of)
    is_reward_model = run.whole.recipe.get("stage") == "reward_model"
    about = ModelCardData(
        model_name=name.rpartition("/")[2],
        base_model=base.hub or None if base else None,
        datasets=sorted({source.hub for source in data if source.hub}) or None,
        library_name="transformers",
        pipeline_tag="text-classification" if is_reward_model else "text-generation",
        tags=["moe-align", str(run.whole.recipe.get("stage")).replace("_", "-")],
        eval_results=results(run, evaluations) or None,
        **licence,
    )
    final = RunDirectory(run.path).final_directory
    precision = (run.whole.recipe.get("weights") or {}).get("precision", "model")
    text = ModelCard.from_template(
        about,
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        name=name,
        base=base,
        teachers=teachers,
        data=data,
        made_of=made_of,
        stages=[(stage.recipe.get("stage"), recipe_text(stage), curve_rows(stage)) for stage in stages],
        evaluations=evaluation_rows(evaluations),
        rounded_to=precision if precision != "model" else None,
        has_adapter=(final / "adapter").is_dir(),
        usage=usage_of(final, name) if is_reward_model else None,
        packages=run.whole.environment.get("packages") or {},
        python=run.whole.environment.get("python"),
    ).content
    body = without_secrets_in(str(text)).rstrip("\n") + "\n"
    return f"{body}\n<!-- align publish: {_digest(body)} -->\n"


def is_edited(file: Path) -> bool:
    """Whether somebody has changed or written a model card: it is not as `model_card`, or a reward model's training, wrote it."""
    card = file.read_text(encoding="utf-8")
    seal = SEAL.search(card)
    return not is_usage(card) and (seal is None or _digest(card[: seal.start()]) != seal[1])


def lineage(run: RunRecord) -> list[Stage]:
    """The stages that made the model of a run, the first one first: its own, and those of the runs whose `final/` it started from."""
    found: list[Stage] = []
    seen: set[Path] = set()
    while run.path not in seen:
        seen.add(run.path)
        found = [*run.stages, *found]
        start = Path(found[0].model_path).expanduser().absolute()
        # Where it was, else beside this run: both may have been moved.
        made = start.parent if start.parent.exists() else run.path.parent / start.parent.name
        if start.name != RunDirectory(made).final_directory.name or read_status(made) is None:
            break
        run = read_run(made)
    return found


def base_of(first: Stage) -> Source | None:
    """The model that was trained, by its own card where that is there or on the hub; None where the weights were new."""
    model = first.recipe.get("model") or {}
    return None if model.get("init") == "random" else _of_model(first.model_path)


def teachers_of(stages: Sequence[Stage]) -> list[Source]:
    """The models whose probabilities stages trained on (`grpo.distill`), each once."""
    options = [(stage.recipe.get("grpo") or {}).get("distill") for stage in stages]
    return list(dict.fromkeys(_of_model(each["teacher"], "distillation") for each in options if each))


def data_of(stages: Sequence[Stage]) -> list[Source]:
    """The data that stages were trained on, each once for a stage."""
    found = []
    for stage in stages:
        for entry in stage.recipe.get("data") or ():
            use = str(stage.recipe.get("stage")).replace("_", " ")
            if entry.get("card"):
                found.append(_of_card(load_card(entry["card"]), use))
            else:
                hub, name = _hub_path(str(entry.get("path"))), Path(str(entry.get("path"))).name
                found.append(Source(hub or f"the file {name}", UNKNOWN, use, hub=hub))
    return list(dict.fromkeys(found))


def _hub_path(path: str) -> str:
    """The name of the data set on the hub that a path of data is in; "" for one here."""
    file = HUB_FILE.fullmatch(path)
    return file[1] if file else path if is_on_hub(path) else ""


def licence_of(made_of: Sequence[Source]) -> dict[str, str]:
    """The hub's keys for the licence of a model: that of its base where nothing is in the way, and never a guess."""
    if any(source.is_non_commercial for source in made_of):
        return {"license": "other", "license_name": "made-of-non-commercial-sources"}
    base = made_of[0] if made_of and not made_of[0].use else None
    if base is None or any(source.licence == UNKNOWN for source in made_of):
        return {"license": UNKNOWN}
    if not base.named:
        return {"license": base.licence.lower()}
    return {"license": "other", "license_name": base.licence} | ({"license_link": base.link} if base.link else {})


def results(run: RunRecord, evaluations: Sequence[Evaluation]) -> list[EvalResult]:
    """The accuracies after the stage, for the hub's `model-index`."""
    recipe = run.whole.recipe
    evaluated = recipe.get("evaluation") or {}
    asked = [evaluated] if evaluated.get("path") else recipe.get("data") or ()
    names = evaluated.get("cards") or [
        each.get("card") or _hub_path(str(each.get("path"))) or Path(str(each.get("path"))).name for each in asked
    ]
    last = next((e for e in reversed(evaluations) if e.right is not None and e.split is None), None)
    if last is None or last.step == 0:
        return []
    low, high = wilson_interval(last.right or 0, last.judged)
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=", ".join(map(_hub_name, names)),
            dataset_name=", ".join(map(_card_name, names)),
            metric_type="accuracy",
            metric_name=f"accuracy of {last.judged} held-out problems (95 % interval {low:.3f} to {high:.3f})",
            metric_value=round(last.numbers["accuracy"], 4),
        )
    ]


def evaluation_rows(evaluations: Sequence[Evaluation]) -> list[list[str]]:
    """A table, its head first: the rates of each evaluation, with 95 % intervals where the answers give one."""
    groups = column_groups(evaluations)
    columns = [column for group in EVALUATED for column in groups.get(group, ()) if not NO_SHARES.fullmatch(column)]
    rows = [
        [e.name, str(e.step), "" if e.hook else str(e.problems), *(_figure(e, column) for column in columns)]
        for e in evaluations
        if any(column in e.numbers for column in columns)
    ]
    return [["evaluation", "step", "problems", *columns], *rows] if rows else []


def curve_rows(stage: Stage) -> list[list[str]]:
    """A table, its head first: the main metrics of a stage at some of its steps."""
    series = {name: found for name, found in metric_series(stage.metrics).items() if name in SHOWN}
    steps = sorted({step for found in series.values() for step in found.steps})
    if not steps:
        return []
    chosen = list(dict.fromkeys(steps[round(i * (len(steps) - 1) / (COLUMNS - 1))] for i in range(COLUMNS)))
    rows = [[name, *(_at(series[name], step) for step in chosen)] for name in SHOWN if name in series]
    return [["step", *map(str, chosen)], *rows]


def recipe_text(stage: Stage) -> str:
    """The recipe of a stage as YAML, without what belongs to the machine or is not given, and with names of local files in place of paths."""
    kept = {key: value for key, value in stage.recipe.items() if key not in MACHINE}
    return yaml.safe_dump(names_of_files(without_secrets_in(kept)), sort_keys=False, allow_unicode=True, width=110)


def usage_of(final: Path, name: str) -> str:
    """How a reward model is called, as a section of its card."""
    from align.model.policy import load_tokenizer

    notes = json.loads((final / "reward_model.json").read_text(encoding="utf-8"))
    return usage(name, load_tokenizer(final), notes["mean"], notes["std"]).partition("\n")[2].strip()


def _hub_name(data: str) -> str:
    """What the data of a card are called on the hub; the name of others."""
    try:
        return _of_card(load_card(data), "").hub or _card_name(data)
    except UserError:
        return _card_name(data)


def _card_name(data: str) -> str:
    """The name of a data card that may be given by its path; other names as they are."""
    return Path(data).stem if data.endswith(".md") else data


def name_of_model(directory: Path) -> str:
    """What a model on this machine is called: of what a run has made, the run."""
    return directory.absolute().parent.name if directory.name == "final" else directory.name


def _of_model(model: str, use: str = "") -> Source:
    """A model on this machine or on the hub."""
    path = Path(model).expanduser()
    if path.is_dir() or path.is_absolute():
        return Source(name_of_model(path), use=use, **_card_licence(path / "README.md"))
    return Source(model, use=use, hub=model if HUB_NAME.fullmatch(model) else "", **_card_licence(model))


def _of_card(card: DataCard, use: str) -> Source:
    hub = card.source.path if isinstance(card.source, HubSource) else ""
    return Source(card.title, card.licence, use, card.homepage or "", hub)


def _card_licence(card: Path | str) -> dict[str, Any]:
    """`licence`, `named` and `link` of a Source, from a model card: a file, or that of a model on the hub.

    The licence is "unknown" where none can be read.
    """
    try:
        if isinstance(card, Path):
            about = ModelCard.load(card, ignore_metadata_errors=True).data if card.is_file() else None
        else:
            about = HfApi().model_info(card, timeout=HUB_TIMEOUT_S).card_data
    except Exception:  # whatever the hub's client and its HTTP library raise where there is no model, network or access
        about = None
    name, link = (str(about.get(key) or "") for key in ("license_name", "license_link")) if about else ("", "")
    if link and "://" not in link:
        # A path in its repository; of a file on this machine nothing is said.
        link = f"{constants.ENDPOINT}/{card}/blob/main/{link}" if isinstance(card, str) else ""
    return {"licence": name or str((about and about.license) or UNKNOWN), "named": bool(name), "link": link}


def _figure(evaluation: Evaluation, column: str) -> str:
    value, interval = evaluation.numbers.get(column), evaluation.interval(column)
    if value is None:
        return ""
    return f"{value:.1%}" + (f" ({interval[0]:.1%} to {interval[1]:.1%})" if interval else "")


def _at(series: Series, step: int) -> str:
    """The last value that was measured up to a step."""
    values = [value for at, value in zip(series.steps, series.values, strict=True) if at <= step and value is not None]
    return f"{values[-1]:.4g}" if values else ""


def names_of_files(value: Any) -> Any:
    """A value of JSON or YAML without what is null, and with names in place of the absolute paths in it."""
    if isinstance(value, Mapping):
        return {key: names_of_files(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [names_of_files(item) for item in value]
    return re.sub(r"^[~/].*/", "", value) if isinstance(value, str) else value


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
