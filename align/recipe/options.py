"""The options of a recipe, section by section: every key that a YAML file may have, but those of `reward` and `rollout`."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from align.losses import DpoLossOptions, LossOptions
from align.options import Options, refuse_without_effect
from align.recipe.presets import PRESETS, PresetName, contradiction, spelled_out
from align.shipped import NAMES, found

HUB_FILE = re.compile(r"hf:/+datasets/([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)")
"""A file or pattern of files on the Hugging Face hub: the data set, its revision, the file."""
HUB_NAME = re.compile(r"(?!.*\.(?:jsonl?|ndjson|parquet|[ct]sv|gz|zst)$)\w[\w.-]*/\w[\w.-]*")
STAGES_OWN = ("before ", "after ", "grpo step ")
"""How the names of the evaluations begin that a stage makes by itself."""


def is_on_hub(path: Path | str) -> bool:
    """Whether data of this path are on the Hugging Face hub: `hf://datasets/...`, or `org/name` where nothing local has this name."""
    return bool(HUB_FILE.fullmatch(str(path)) or (HUB_NAME.fullmatch(str(path)) and not Path(path).exists()))


# YAML takes a bare `off` for false.
Replay = Annotated[
    Literal["off", "sampler", "learner"], BeforeValidator(lambda value: "off" if value is False else value)
]


class RunOptions(Options):
    """Where a run's files go."""

    dir: Path | None = Field(None, description="run directory; runs/NAME when not given")
    overwrite: bool = Field(False, description="replace the run that the directory already holds")
    allow_changes: bool = Field(
        False, description="go on with an interrupted run although its recipe or data have changed"
    )
    grace_s: float | None = Field(
        None,
        ge=0,
        description="seconds that a step may take to end, and its checkpoint to be written, once the run is to stop; when not given 8, or what a "
        "larger checkpoint takes at 500 MB/s",
    )


class MachineOptions(Options):
    """What the machine must have."""

    cores: int = Field(1, ge=1, description="cores that the run must be able to use")
    memory_gb: float = Field(1.0, gt=0, description="memory that must be free, in GiB")


class TrackerOptions(Options):
    """An experiment tracker that follows the run."""

    name: Literal["tensorboard", "trackio", "wandb", "mlflow"] = Field(description="which one")
    project: str | None = Field(
        None,
        min_length=1,
        description="project there, for MLflow the experiment; that of WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME, or else moe-align, "
        "when not given",
    )
    samples: int = Field(
        0,
        ge=0,
        description="answers of a step and of an evaluation that are sent there as a table; with 0, no text of the data",
    )

    @model_validator(mode="after")
    def _no_project_of_files(self) -> Self:
        if self.name == "tensorboard" and self.project is not None:
            raise ValueError("project has no effect on tensorboard, whose files are in the run directory: leave it out")
        return self


class ModelOptions(Options):
    """The policy to start from."""

    path: str = Field(description="Hugging Face directory or hub name")
    init: Literal["pretrained", "random"] = Field(
        "pretrained", description="take the weights that are there, or draw new ones from the recipe's seed"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="type of the weights, in learner and sampler; `fastest` is bfloat16 on GPUs and on CPUs that multiply faster in it, "
        "else float32, chosen when a run begins and kept in its recipe",
    )
    trust_remote_code: bool = Field(
        False, description="run the Python code that comes with the model; only for a model whose code you have read"
    )

    @field_validator("path")
    @classmethod
    def _find_what_is_shipped(cls, path: str) -> str:
        return str(found(Path(path))) if path.startswith(NAMES) else path


HUB_KEYS = ("config", "revision", "hub_split")


class DataOptions(Options):
    """Which examples of which data card or files. A recipe may list several; each step then takes from all of them."""

    card: str | None = Field(
        None, description="name of a card in data_cards/, or a path to one; none where path is data of one's own"
    )
    split: Literal["train", "validation", "test"] = Field(
        "train", description="validation is for GRPO without evaluation.every alone; test is never trained on"
    )
    path: Path | None = Field(
        None,
        description="file, files by a pattern, or directory with a file for each split: data of one's own, whose columns say what they are; "
        "where nothing local has this name, org/name or hf://datasets/org/name/FILE on the Hugging Face hub; beside a card, what is read in "
        "place of its source",
    )
    config: str | None = Field(None, description="configuration of the hub's data set; its default when not given")
    revision: str | None = Field(
        None, description="branch, tag or commit of the hub's data set; its main branch when not given"
    )
    hub_split: str | None = Field(
        None,
        description="split of the hub's data set that is read, and split by a hash as a file is; its train, validation and test when not given",
    )
    held_out: float = Field(
        0.05,
        gt=0,
        lt=0.5,
        description="without a card: share of the prompts that the validation split, and the test split, have of a file alone",
    )
    bad_rows: Literal["refuse", "leave_out"] = Field(
        "refuse", description="without a card: rows that cannot be used end the run, or are left out and counted"
    )
    stream: bool = Field(
        False,
        description="without a card: read the rows in turn while the run goes on, and fetch the hub's files one by one; the first 10000 are "
        "checked before the start and give what is held out, and of each 10000 in turn the order is shuffled",
    )
    levels: list[int] | None = Field(None, description="difficulty levels to keep; all when not given")
    limit: int | None = Field(None, ge=1, description="first so many examples, after a seeded shuffle")
    params: dict[str, Any] = Field(
        {}, description="parameters of a generated source, for what is trained on; evaluations take the card as it is"
    )
    share: float = Field(1.0, gt=0, description="part of each step that comes from here, relative to the others")
    too_long: Literal["leave_out", "refuse"] = Field(
        "leave_out", description="what becomes of an example that has more tokens than there is room for"
    )

    @model_validator(mode="after")
    def _is_a_card_or_files(self) -> Self:
        if self.card is None and self.path is None:
            raise ValueError("name a card, or give the path of data of one's own")
        if self.card is not None:
            for key in ("held_out", "bad_rows", "stream", *HUB_KEYS):
                refuse_without_effect(self, key, "the card says what its splits are and how it is read", at="data.")
        elif not is_on_hub(self.path or ""):
            for key in HUB_KEYS:
                refuse_without_effect(self, key, f"{self.path} is on this machine, not on the hub", at="data.")
        elif HUB_FILE.fullmatch(str(self.path)):
            for key in ("config", "hub_split"):
                refuse_without_effect(self, key, "path names a file of the hub", at="data.")
        return self

    @model_validator(mode="after")
    def _a_stream_is_read_in_turn(self) -> Self:
        for key in ("split", "levels", "limit") if self.stream else ():
            refuse_without_effect(self, key, "a stream is read in turn, and nobody knows how long it is", at="data.")
        return self

    @model_validator(mode="after")
    def _test_is_held_out(self) -> Self:
        if self.split == "test":
            raise ValueError("split: test is what a policy is evaluated on: train on another split")
        return self


class SftOptions(Options):
    """Supervised fine-tuning (DeepSeek-V2 report, section 4.1)."""

    steps: int = Field(ge=1, description="optimizer steps")
    sequences_per_step: int = Field(64, ge=1, description="conversations of an optimizer step, over all ranks")
    turns: Literal["all", "last"] = Field(
        "all",
        description="turns of the assistant in a conversation that are trained on; of all, those without a weight of 0",
    )
    validate_every: int = Field(100, ge=1, description="steps between two validation losses")
    validation_limit: int = Field(256, ge=1, description="examples of each entry of data for the validation loss")


class RewardModelOptions(Options):
    """A reward model, trained on preferences from the SFT policy (DeepSeek-V2 report, section 4.2)."""

    loss: Literal["pairwise", "pointwise"] = Field(
        "pairwise", description="both completions compared, or each judged alone; see align.losses"
    )
    steps: int = Field(ge=1, description="optimizer steps")
    pairs_per_step: int = Field(64, ge=1, description="pairs of an optimizer step, over all ranks")
    margin_scale: float = Field(
        0.0, ge=0, description="a preference's own margin times this is subtracted from the difference of the rewards"
    )
    max_length: int = Field(512, ge=2, description="prompt and completion, in tokens; pairs with more are left out")
    validate_every: int = Field(50, ge=1, description="steps between two looks at the validation pairs")
    validation_limit: int = Field(256, ge=1, description="validation pairs of a data card")
    test_limit: int = Field(1024, ge=1, description="test pairs of a data card, for the evaluation at the end")


class DpoOptions(DpoLossOptions):
    """Direct Preference Optimization (Rafailov et al. 2023, arXiv 2305.18290)."""

    steps: int = Field(ge=1, description="optimizer steps")
    pairs_per_step: int = Field(ge=1, description="pairs of a step, over all data")
    validate_every: int = Field(50, ge=1, description="steps between two looks at the validation pairs")
    validation_limit: int = Field(256, ge=1, description="validation pairs of a data card")


class GrpoOptions(LossOptions):
    """Group Relative Policy Optimization (DeepSeekMath, arXiv 2402.03300, section 4.1; DeepSeek-V2 report, eq. 32-34)."""

    steps: int = Field(ge=1, description="exploration steps: sample, score, train, send weights")
    prompts_per_step: int = Field(ge=1, description="prompts of a step, over all data")
    group_size: int = Field(
        ge=1,
        description="completions of a prompt (G); 1 where grpo.distill alone teaches, or a reward is compared with the step's mean (baseline: batch)",
    )
    updates_per_step: int = Field(1, ge=1, description="optimizer updates on the samples of one step")
    routing_replay: Replay = Field(
        "off",
        description="experts that tokens go through in training: those that the learner's routers choose; the sampler's (R3); or those of the "
        "learner before a step's first update (R2)",
    )
    preset: PresetName | None = Field(
        None,
        description=f"a method by name ({', '.join(PRESETS)}): it stands for keys of this section, of which given ones win; `align check` shows them",
    )
    train_on_truncated: bool = Field(True, description="train on completions cut off at the length limit")
    drop_zero_variance_groups: bool = Field(False, description="leave out groups whose rewards are all equal")
    refill_rounds: int = Field(
        0,
        ge=0,
        description="times that groups whose rewards are all equal are replaced in a step by groups of further prompts (DAPO's dynamic sampling)",
    )
    skip_zero_gradient: bool = Field(
        False,
        description="do not compute samples whose advantage is 0, but for 256 tokens of an update for the agreement gate: the same gradient for less",
    )

    @model_validator(mode="before")
    @classmethod
    def _expand_the_preset(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        # Before anything is said of keys that only the preset has given.
        if found := contradiction(data):
            raise ValueError(found)
        return spelled_out(data)

    @model_validator(mode="after")
    def _zero_variance_teaches_nothing(self) -> Self:
        if self.baseline == "batch" and self.refill_rounds:
            raise ValueError(
                "refill_rounds replaces groups whose rewards are all equal, but compared with the step's mean (baseline: batch) these teach "
                "something: leave one of them out"
            )
        if self.group_size == 1 and self.drop_zero_variance_groups:
            given = f", which preset: {self.preset} sets" if self.preset else ""
            raise ValueError(
                f"drop_zero_variance_groups{given}, drops every group of one completion (group_size: 1): set it to false, or take larger groups"
            )
        if self.skip_zero_gradient and (self.kl_coefficient or self.distill):
            beside = "a KL (kl_coefficient)" if self.kl_coefficient else "distillation (distill)"
            raise ValueError(
                f"skip_zero_gradient has no effect beside {beside}, whose gradient every sample has: leave one of them out"
            )
        return self


class PreferencesOptions(Options):
    """Pairs of the policy's own answers, the better one known by its verdict (DeepSeek-V2 report, section 4.2)."""

    prompts: int = Field(512, ge=1, description="training prompts of each data card that has no data.limit of its own")
    held_out_prompts: int = Field(128, ge=1, description="prompts of each of the card's other splits")
    samples: int = Field(8, ge=2, description="answers of a prompt")
    pairs_per_prompt: int = Field(2, ge=1, description="pairs of a prompt at most, no answer in two of them")


class ScoringOptions(Options):
    """The pool of processes that judge completions while others are being sampled."""

    workers: int = Field(1, ge=1, description="processes that judge completions")
    gpus: float = Field(
        0, ge=0, description="GPUs of a worker, for reward models; a share lets workers have one together"
    )
    timeout_s: float = Field(600, gt=0, description="longest time a group may take to be judged, in seconds")
    start_timeout_s: float | None = Field(
        None,
        gt=0,
        description="longest time a worker may take to load its reward models, in seconds; when not given, 300 and the time to read their "
        "files at 100 MB/s",
    )
    infra_error_limit: float = Field(
        0.05,
        ge=0,
        le=1,
        description="share of the samples that nobody could judge above which the run stops: of those of an evaluation, or of a step and those before it, "
        "as a part of 64 prompts and 256 samples at least; where none at all was judged, it stops too",
    )


class HookOptions(Options):
    """A registered evaluation of the checkpoint that a stage wrote; `align evaluations list` shows them."""

    name: str = Field(description="name of the evaluation")
    params: dict[str, Any] = Field({}, description="its parameters")
    label: str | None = Field(
        None, pattern=r"^[^/.][^/]*$", description="what its results are called; its name when not given"
    )

    @property
    def title(self) -> str:
        """What its results are called."""
        return self.label or self.name


class AgainstOptions(Options):
    """An earlier run whose answers to the same problems are compared with: how often the new ones are better."""

    run: Path = Field(description="run directory, or the checkpoint in it")
    judge: str = Field(description="component of the reward by which answers are compared")


class EvaluationOptions(Options):
    """Held-out problems answered by the policy, before and after the stage, and whatever else is asked of it then."""

    cards: list[str] | None = Field(
        None,
        description="data cards; when not given, the training data's: their cards, and what is held out of files without one",
    )
    split: Literal["validation", "test"] = Field(
        "test", description="whose problems are asked before and after the stage"
    )
    path: Path | None = Field(
        None,
        description="local file, or directory with a file for each split, in place of the source of the only card; where the training data "
        "have no card, files of one's own, or data on the hub as in data.path, to evaluate on in place of what is held out of them",
    )
    levels: list[int] | None = Field(None, description="difficulty levels to keep of the only card")
    limit: int = Field(256, ge=1, description="problems of a card, after a seeded shuffle")
    samples: int = Field(4, ge=0, description="samples a problem for pass@k, drawn at temperature 1; 0 leaves it out")
    before: bool = Field(
        True, description="also before the first step; not where SFT, as `init_from`, has just been asked the same"
    )
    every: int | None = Field(
        None,
        ge=1,
        description="GRPO: also every so many steps, on the validation split, by which the most accurate checkpoint is chosen",
    )
    max_new_tokens: int = Field(64, ge=1, description="longest answer, in tokens")
    against: AgainstOptions | None = None
    hooks: list[HookOptions] = Field([])

    @model_validator(mode="after")
    def _results_do_not_overwrite_each_other(self) -> Self:
        titles = [hook.title for hook in self.hooks]
        for title in titles:
            if titles.count(title) > 1:
                raise ValueError(f"two hooks are called {title!r}, where each needs a label of its own")
            if title.lower().startswith(STAGES_OWN):
                raise ValueError(
                    f"a hook is called {title!r}, as the stage's own evaluations are: give it another label"
                )
        return self


class AgreementOptions(Options):
    """How far sampler and learner may differ: in the log-probability of a token, and in the experts that it goes through."""

    warn_mean: float | None = Field(
        None, gt=0, description="mean |difference|; by dtype, or a coarser weights.precision, when not given"
    )
    stop_mean: float | None = Field(
        None, gt=0, description="mean |difference|; by dtype, or a coarser weights.precision, when not given"
    )
    stop_routing: float | None = Field(
        None,
        ge=0,
        le=1,
        description="share of the tokens of a layer that the learner sends to other experts than the sampler did, where experts are recorded, "
        "beyond which the run stops; it warns at half of it. 0 in float32, 0.2 in bfloat16, 0.4 and 0.8 with weights rounded to int8 and fp8 when not "
        "given",
    )

    def limits(self, grid: str) -> tuple[float, float]:
        """(warn, stop): mean |difference| in nats a token, as given or as the dtype, or the grid that weights are rounded to, can hold."""
        # In float32 a token whose router was undecided can go to another expert: 0.1 nats of one token, 2e-5 of a step's mean.
        by_grid = {"float32": (1e-4, 1e-3), "bfloat16": (0.08, 0.15), "int8": (0.15, 0.3), "fp8": (0.3, 0.6)}
        warn, stop = by_grid[grid]
        return self.warn_mean or warn, self.stop_mean or stop

    def routing_limit(self, grid: str) -> float:
        """`stop_routing`, as given or as the dtype or grid can hold: in float32 two routers differ where logits tie, which is not counted."""
        by_grid = {"float32": 0.0, "bfloat16": 0.2, "int8": 0.4, "fp8": 0.8}
        return by_grid[grid] if self.stop_routing is None else self.stop_routing


class AlarmOptions(Options):
    """When a run is told to be going wrong; what is compared with earlier steps waits until there are `window` of them."""

    window: int = Field(
        5, ge=1, description="steps that are compared with: for entropy and experts the first, for the reward the last"
    )
    entropy_share: float = Field(
        0.1, ge=0, le=1, description="share of the first steps' entropy below which it collapsed"
    )
    zero_variance_groups: float = Field(0.95, gt=0, description="share of groups whose rewards are all equal")
    reward_jump: float = Field(1.0, gt=0, description="change of the mean reward, in standard deviations of a sample's")
    dead_experts: float = Field(0.5, gt=0, description="share of a layer's experts that no token goes to")
    busiest_expert: float = Field(
        3.0,
        gt=1,
        description="load of a layer's busiest expert over the mean, where it was 1.5 times lower in the first steps",
    )
    habit_share: float = Field(
        0.3, gt=0, le=1, description="share of the answers with a habit that at most a third as many had at the start"
    )
    length_ratio: float = Field(
        2.0, gt=1, description="how many times longer or shorter answers are than at the start, in words"
    )
    drift: float = Field(1.0, gt=0, description="`difference` of the evaluation `drift`, in nats a token")
    stop: list[Literal["entropy", "variance", "reward", "experts", "collapse", "refill", "idle", "habit", "length"]] = (
        Field([], description="alarms that end the run; after a warning alone it goes on")
    )


class GuardOptions(Options):
    """An alarm for over-optimisation: the reward that is learned from goes up while the one that is trusted goes down."""

    learned: str = Field(description="component of the reward, such as the label of a reward model")
    trusted: str = Field(description="component that is not trained on, such as a rule of weight 0")
    window: int = Field(5, ge=2, description="steps that are compared with as many before them")
