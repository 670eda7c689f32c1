"""The recipe: what a stage does, as typed values read from YAML and `key=value` overrides."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from align.errors import UserError
from reward import RewardTerm
from rollout.types import FleetOptions, SamplingOptions


class Section(BaseModel):
    """A part of a recipe: unknown keys are refused, values are not changed once read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class RunOptions(Section):
    """Where a run's files go."""

    dir: Path | None = Field(None, description="run directory; runs/NAME when not given")
    overwrite: bool = Field(False, description="replace the run that the directory already holds")


class ModelOptions(Section):
    """The policy to start from."""

    path: str = Field(description="Hugging Face directory or hub name")
    init: Literal["pretrained", "random"] = Field(
        "pretrained", description="take the weights that are there, or draw new ones from the recipe's seed"
    )
    dtype: Literal["float32", "bfloat16"] = "float32"
    trust_remote_code: bool = False


class DataOptions(Section):
    """Which examples of which data card."""

    card: str = Field(description="name of a card in data_cards/, or a path to one")
    split: Literal["train", "validation", "test"] = "train"
    path: Path | None = Field(None, description="local file to read in place of the card's source")
    levels: list[int] | None = Field(None, description="difficulty levels to keep; all when not given")
    limit: int | None = Field(None, ge=1, description="first so many examples, after a seeded shuffle")
    params: dict[str, Any] = Field({}, description="parameters of a generated source")


class OptimizerOptions(Section):
    """AdamW and its schedule."""

    learning_rate: float = Field(gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    final_ratio: float = Field(0.1, ge=0, le=1, description="last learning rate as a share of the highest")
    clip_norm: float = Field(1.0, ge=0, description="largest gradient norm; 0 does not clip")


class LearnerOptions(Section):
    """The DeepSpeed learners."""

    ranks: int = Field(2, ge=1, description="learner processes, data parallel")
    threads: int = Field(1, ge=1, description="CPU threads of a rank")
    zero_stage: Literal[0, 1, 2, 3] = 1
    micro_batch_tokens: int = Field(4096, ge=1, description="tokens of a micro-batch, padding included")
    gradient_checkpointing: bool = False
    port: int | None = Field(None, ge=1024, le=65535, description="where the ranks meet; a free port when not given")
    optimizer: OptimizerOptions
    start_timeout_s: float = Field(600, gt=0)
    step_timeout_s: float = Field(1800, gt=0)


class SftOptions(Section):
    """Supervised fine-tuning (DeepSeek-V2 report, section 4.1)."""

    steps: int = Field(ge=1, description="optimizer steps")
    sequences_per_step: int = Field(64, ge=1)
    validate_every: int = Field(100, ge=1, description="steps between two validation losses")
    validation_limit: int = Field(256, ge=1, description="examples of the validation loss")


class GrpoOptions(Section):
    """Group Relative Policy Optimization (DeepSeekMath, arXiv 2402.03300, section 4.1; DeepSeek-V2 report, eq. 32-34)."""

    steps: int = Field(ge=1, description="exploration steps: sample, score, train, send weights")
    prompts_per_step: int = Field(ge=1)
    group_size: int = Field(ge=2, description="completions of a prompt (G)")
    updates_per_step: int = Field(1, ge=1, description="optimizer updates on the samples of one step")
    clip_low: float = Field(0.2, ge=0, lt=1)
    clip_high: float = Field(0.2, ge=0)
    kl_coefficient: float = Field(0.0, ge=0, description="weight of the k3 KL to the reference (beta)")
    level: Literal["token", "sequence"] = Field(
        "token",
        description="importance ratio of a token (DeepSeekMath eq. 3) or of a completion (report eq. 32)",
    )
    aggregation: Literal["sample_mean", "token_mean", "sequence_sum"] = Field(
        "sample_mean", description="how token losses become one loss; see align.losses.completion_weights"
    )
    advantage_scale: Literal["std", "none"] = Field(
        "std", description="divide by the group's standard deviation, or only centre"
    )
    train_on_truncated: bool = Field(True, description="train on completions cut off at the length limit")
    drop_uniform_groups: bool = Field(False, description="leave out groups whose rewards are all equal")


class AgreementOptions(Section):
    """How far sampler and learner may differ in the log-probability of a token."""

    warn_mean: float | None = Field(None, gt=0, description="mean |difference|; by dtype when not given")
    stop_mean: float | None = Field(None, gt=0, description="mean |difference|; by dtype when not given")

    def limits(self, dtype: str) -> tuple[float, float]:
        """(warn, stop): mean |difference| in nats a token, as given or as the dtype can hold."""
        by_dtype = {"float32": (1e-5, 1e-3), "bfloat16": (0.03, 0.15)}
        warn, stop = by_dtype[dtype]
        return self.warn_mean or warn, self.stop_mean or stop


class EvaluationOptions(Section):
    """Held-out problems answered by the policy, before and after the stage."""

    card: str | None = Field(None, description="data card; that of the training data when not given")
    split: Literal["validation", "test"] = "test"
    path: Path | None = None
    levels: list[int] | None = None
    limit: int = Field(256, ge=1, description="problems, after a seeded shuffle")
    samples: int = Field(4, ge=0, description="samples a problem for pass@k; 0 leaves it out")
    every: int | None = Field(None, ge=1, description="also every so many steps")
    max_new_tokens: int = Field(64, ge=1)


class MachineOptions(Section):
    """What the machine must have."""

    cores: int = Field(1, ge=1)
    memory_gb: float = Field(1.0, gt=0, description="GiB that must be free")


class Recipe(Section):
    """What every stage has."""

    stage: Literal["sft", "grpo"]
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(0, ge=0)
    run: RunOptions = RunOptions()
    machine: MachineOptions = MachineOptions()
    model: ModelOptions
    data: DataOptions
    rewards: list[RewardTerm] = Field(min_length=1)
    rollout: FleetOptions = FleetOptions()
    learner: LearnerOptions
    evaluation: EvaluationOptions = EvaluationOptions()
    agreement: AgreementOptions = AgreementOptions()
    save_every: int | None = Field(
        None, ge=1, description="steps between checkpoints; only the final one when not given"
    )

    @property
    def directory(self) -> Path:
        return self.run.dir or Path("runs") / self.name


class SftRecipe(Recipe):
    """Supervised fine-tuning."""

    stage: Literal["sft"]
    sft: SftOptions


class GrpoRecipe(Recipe):
    """Reinforcement learning with GRPO."""

    stage: Literal["grpo"]
    init_from: Path | None = Field(
        None, description="SFT recipe that trains the starting policy, run first and with this recipe's seed"
    )
    sampling: SamplingOptions = SamplingOptions()
    grpo: GrpoOptions

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature is 0: greedy completions of a group are all alike; use 1.0")
        if self.sampling.max_new_tokens >= self.rollout.max_length:
            raise ValueError(
                f"sampling.max_new_tokens ({self.sampling.max_new_tokens}) leaves no room for a prompt in "
                f"rollout.max_length ({self.rollout.max_length})"
            )
        if self.grpo.prompts_per_step % self.grpo.updates_per_step:
            raise ValueError(
                f"grpo.prompts_per_step ({self.grpo.prompts_per_step}) cannot be split into "
                f"grpo.updates_per_step ({self.grpo.updates_per_step}) equal parts"
            )
        return self


STAGES: dict[str, type[Recipe]] = {"sft": SftRecipe, "grpo": GrpoRecipe}


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> SftRecipe | GrpoRecipe:
    """Read and check a recipe. Raises UserError that names the file, the line and the key of a mistake."""
    values, lines = read_yaml(path)
    for override in overrides:
        apply_override(values, override)
    stage = values.get("stage")
    if stage not in STAGES:
        raise UserError(f"{path}: stage must be one of {', '.join(STAGES)}, but is {stage!r}")
    try:
        recipe = STAGES[stage].model_validate(values)
    except ValidationError as error:
        raise UserError("\n".join(explain(error, path, lines, STAGES[stage]))) from None
    check_files(recipe, path, lines)
    assert isinstance(recipe, SftRecipe | GrpoRecipe)
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML that `load_recipe` reads back to an equal one."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    """The mapping in a YAML file, and the line of each of its keys by path."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise UserError(f"{path}: no such recipe" + (f"; there are {', '.join(near)}" if near else "")) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a recipe: {error}") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys to values")
    lines: dict[tuple[str, ...], int] = {}
    collect_lines(node, (), lines, path)
    return values, lines


def collect_lines(node: yaml.Node | None, at: tuple[str, ...], lines: dict[tuple[str, ...], int], path: Path) -> None:
    """Note the line of every key below `node`; a key given twice is refused."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*at, str(key.value))
            if here in lines:
                raise UserError(
                    f"{path}, line {key.start_mark.line + 1}: {'.'.join(here)} is given twice "
                    f"(first on line {lines[here]})"
                )
            lines[here] = key.start_mark.line + 1
            collect_lines(value, here, lines, path)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*at, str(index))] = item.start_mark.line + 1
            collect_lines(item, (*at, str(index)), lines, path)


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set `a.b.c=value` (the value is read as YAML) in a nested mapping."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"{override!r}: an override has the form key=value, for example grpo.steps=20")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{override!r}: the value is not valid YAML: {error}") from None
    *parents, last = key.split(".")
    at: Any = values
    for parent in parents:
        if isinstance(at, list) and parent.isdigit() and int(parent) < len(at):
            at = at[int(parent)]
        elif isinstance(at, dict):
            at = at.setdefault(parent, {})
    if isinstance(at, list) and last.isdigit() and int(last) < len(at):
        at[int(last)] = value
    elif isinstance(at, dict):
        at[last] = value
    else:
        raise UserError(f"{override!r}: {'.'.join(parents)} is a single value and has no key {last!r}")


def explain(
    error: ValidationError, path: Path, lines: Mapping[tuple[str, ...], int], model: type[BaseModel]
) -> list[str]:
    """One line for each mistake: where it is, what is wrong, and the nearest known key."""
    messages = []
    for problem in error.errors():
        at = tuple(str(part) for part in problem["loc"])
        line = next((lines[at[:n]] for n in range(len(at), 0, -1) if at[:n] in lines), None)
        where = f"{path}, line {line}: " if at and at in lines else f"{path}: "
        key = ".".join(at)
        if problem["type"] == "extra_forbidden":
            known = known_keys(model, at[:-1])
            near = difflib.get_close_matches(at[-1], known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            messages.append(f"{where}unknown key {key!r}; {hint}")
        elif problem["type"] == "missing":
            after = f" (the section begins on line {line})" if line else ""
            messages.append(f"{path}: missing key {key!r}{after}")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            given = "" if isinstance(problem["input"], dict | BaseModel) else f", not {problem['input']!r}"
            messages.append(f"{where}{key + ': ' if key else ''}{message}{given}")
    return messages


def known_keys(model: type[BaseModel], at: Sequence[str]) -> list[str]:
    """The keys of the section at a path."""
    for part in at:
        if part.isdigit():
            continue
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        nested = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not nested:
            return []
        model = nested[0]
    return list(model.model_fields)


def check_files(recipe: Recipe, path: Path, lines: Mapping[tuple[str, ...], int]) -> None:
    """Refuse files and directories that a recipe names and that are not there."""
    named: dict[tuple[str, ...], Path | None] = {
        ("data", "path"): recipe.data.path,
        ("evaluation", "path"): recipe.evaluation.path,
    }
    if isinstance(recipe, GrpoRecipe):
        named[("init_from",)] = recipe.init_from
    model = Path(recipe.model.path)
    if (
        model.is_absolute()
        or recipe.model.path.startswith((".", "~"))
        or (model.parent.is_dir() and len(model.parts) > 2)
    ):
        named[("model", "path")] = model
    for key, file in named.items():
        if file is not None and not file.exists():
            line = f", line {lines[key]}" if key in lines else ""
            raise UserError(f"{path}{line}: {'.'.join(key)} names {file}, which does not exist")
    if model.is_dir():
        check_model_directory(model, recipe.model)


def check_model_directory(directory: Path, options: ModelOptions) -> None:
    """Refuse a model directory that lacks its configuration, tokenizer or weights."""
    if not (directory / "config.json").is_file():
        raise UserError(f"model.path: {directory} has no config.json; give a Hugging Face model directory")
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise UserError(
            f"model.path: {directory} has no tokenizer (tokenizer.json); copy the tokenizer files of the model beside "
            "its weights"
        )
    if options.init == "pretrained" and not any(directory.glob("*.safetensors")):
        raise UserError(
            f"model.path: {directory} has no weights (*.safetensors); give a trained model, "
            "or set model.init=random to draw new weights from the seed"
        )
