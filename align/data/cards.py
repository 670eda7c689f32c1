"""Data cards: `data_cards/NAME.md`. The front matter is the loader's configuration, the text is for people.

Keys that the loader does not act on (`title`, `licence`, `homepage`, what the `splits` are and `why` they are
held apart so) are what a listing of the cards shows; there are no others.
"""

from itertools import combinations, pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError, ValidationInfo, model_validator

from align.data.code_rows import CodeRows
from align.data.generators import generator
from align.data.pair_rows import PairRows
from align.data.types import SplitName, Strict
from align.errors import UserError, nearest
from align.recipe.options import is_on_hub
from align.shipped import CARDS
from reward.rows import DOMAIN

Stage = Literal["sft", "reward_model", "grpo", "eval"]
Model = TypeVar("Model", bound=BaseModel)


class Fields(Strict):
    """Which column of a table is what."""

    prompt: str
    """Text; for preferences it may also be a conversation, and of hh-rlhf one of the columns of dialogues."""
    response: str | None = None
    """A demonstration; None where the rows have none fit to imitate."""
    answer: str | None = None
    """The ground truth; a row without it is an error."""
    answer_after: str | None = None
    """The answer is what follows the last of these marks in its column."""
    answer_boxed: bool = False
    r"""The answer is what the last \boxed{} in its column holds, or the last ones that are joined; a row whose box is blank is left out."""
    level: str | None = None
    """The difficulty: a whole number, or text that ends in one, such as "Level 3"."""
    tests: CodeRows | None = None
    """The tests of a programming task: they go into the metadata, and the prompt says what they ask for."""
    preference: PairRows | None = None
    """Two completions of the prompt of which one was preferred, to train reward models on."""

    @model_validator(mode="after")
    def _know_where_the_answer_is(self) -> Self:
        if self.answer_after is not None and self.answer_boxed:
            raise ValueError("answer_after and answer_boxed are two places of one answer: give one of them")
        if self.answer is None and (self.answer_after is not None or self.answer_boxed):
            raise ValueError("answer_after and answer_boxed need the column of the answer")
        return self


class TableSplit(Strict):
    """Some rows of a table: a share of its prompts, drawn by hash."""

    table: str = Field(alias="from")
    """A split of the hub's, or a file beside the card."""
    percent: tuple[Annotated[int, Field(ge=0, le=100)], Annotated[int, Field(ge=0, le=100)]] = (0, 100)
    """From where to where in the order of the hashes, the end excluded."""


class TableSource(Strict):
    """What the hub's tables and local ones have in common."""

    splits: dict[SplitName, TableSplit]
    fields: Fields

    @model_validator(mode="after")
    def _hold_splits_apart(self) -> Self:
        for (name, split), (other_name, other) in combinations(self.splits.items(), 2):
            first, end = max(split.percent[0], other.percent[0]), min(split.percent[1], other.percent[1])
            if split.table == other.table and first < end:
                raise ValueError(f"splits {name} and {other_name} take the same rows of {split.table!r}")
        return self


class HubSource(TableSource):
    """A data set of the Hugging Face hub."""

    kind: Literal["hub"]
    path: str
    config: str | None = None
    revision: str = "main"
    files: dict[str, str] | None = None
    """Split of the hub's -> its files, JSON lines or Parquet, for a repository that the hub's client cannot read."""

    @model_validator(mode="after")
    def _have_files_of_each_split(self) -> Self:
        if self.files is None:
            return self
        if self.config is not None:
            raise ValueError("config has no effect where files says what is read: leave one of them out")
        if missing := {split.table for split in self.splits.values()} - set(self.files):
            raise ValueError(f"files: there are none of {', '.join(sorted(missing))}")
        return self


class FileSource(TableSource):
    """Local files, JSON lines or Parquet by their suffix; relative paths start at the card."""

    kind: Literal["file"]

    @model_validator(mode="before")
    @classmethod
    def _start_at_the_card(cls, data: Any, info: ValidationInfo) -> Any:
        match data:
            case {"splits": dict(splits)} if info.context:
                return data | {"splits": {name: _beside(info.context, split) for name, split in splits.items()}}
        return data


class OwnSource(Strict):
    """Files whose columns say what is in them, see `align.data.forms`: a file, several by a pattern, or a directory with `train.jsonl` and
    others. What is not in files of its own is drawn from `train` by a hash of its prompts."""

    kind: Literal["own"]
    path: str
    splits: tuple[SplitName, ...] = ("train", "validation", "test")
    held_out: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    """The share of the prompts that each of the splits that are not trained on has of those in `train`."""
    bad_rows: Literal["refuse", "leave_out"] = "refuse"
    config: str | None = None
    revision: str | None = None
    hub_split: str | None = None
    """Which files of a data set of the Hugging Face hub, see `align.data.hub`."""
    stream: bool = False
    """Only the first rows are read before they are needed, see `align.data.drawing.Stream`."""
    domain: str = DOMAIN
    """Of rows that name none; when not given, the card's."""

    @model_validator(mode="before")
    @classmethod
    def _start_at_the_card(cls, data: Any, info: ValidationInfo) -> Any:
        if not info.context or "path" not in data:
            return data
        beside = info.context / data["path"]
        return data if is_on_hub(data["path"]) and not beside.exists() else data | {"path": str(beside)}


class GeneratorSource(Strict):
    """Problems that this project generates, see `align.data.generators`; the generator decides the splits."""

    splits: ClassVar[tuple[SplitName, ...]] = ("train", "validation", "test")

    kind: Literal["generator"]
    name: str
    params: dict[str, Any] = Field(default={})

    @model_validator(mode="after")
    def _have_known_params(self) -> Self:
        try:
            generator(self.name).params.model_validate(self.params)
        except ValidationError as error:
            raise ValueError("params: " + "; ".join(_problem(detail) for detail in error.errors())) from None
        return self


class SeedRange(Strict):
    """Row i of a split is generated from `seed` + i."""

    size: int = Field(ge=1)
    seed: int = Field(ge=0)


class ReasoningGymSource(Strict):
    """A task of the library reasoning_gym."""

    kind: Literal["reasoning_gym"]
    task: str
    params: dict[str, Any] = Field(default={})
    """Of the task's configuration, other than size and seed."""
    solution: str | None = None
    """The key of an entry's metadata with a worked solution, to be learned from; `####` and what follows it is left out."""
    splits: dict[SplitName, SeedRange]

    @model_validator(mode="after")
    def _hold_splits_apart(self) -> Self:
        by_seed = sorted(self.splits.items(), key=lambda item: item[1].seed)
        for (name, split), (next_name, following) in pairwise(by_seed):
            if split.seed + split.size > following.seed:
                raise ValueError(
                    f"splits {name} and {next_name} share seeds: row i comes from seed + i, "
                    f"so {next_name} must start at {split.seed + split.size} or later"
                )
        return self


class Decontamination(Strict):
    """How evaluation is kept out of training."""

    method: Literal["exact_prompt"] = "exact_prompt"
    """Equal but for case and white space."""
    against: list[Literal["validation", "test"]] = Field(min_length=1)
    why: str


class DataCard(Strict):
    """The front matter of a card."""

    name: str
    title: str
    source: Annotated[
        HubSource | FileSource | OwnSource | GeneratorSource | ReasoningGymSource, Field(discriminator="kind")
    ]
    instruction: str | None = None
    """Follows each prompt, after a line break: what the source does not say about the form of an answer."""
    licence: str
    homepage: str | None = None
    stages: list[Stage] = Field(min_length=1)
    domain: str
    splits: dict[SplitName, str]
    """What each split is, in words; the same splits as the source has."""
    decontamination: Decontamination

    @property
    def called(self) -> str:
        """What messages call it: by its name, or by the path of data without a card."""
        return self.source.path if isinstance(self.source, OwnSource) else f"data card {self.name}"

    @model_validator(mode="before")
    @classmethod
    def _give_rows_its_domain(cls, data: Any) -> Any:
        source = data.get("source") if isinstance(data, dict) else None
        if isinstance(source, dict) and source.get("kind") == "own" and "domain" in data:
            return data | {"source": {"domain": data["domain"]} | source}
        return data

    @model_validator(mode="after")
    def _be_consistent(self) -> Self:
        if set(self.splits) != set(self.source.splits):
            raise ValueError(
                f"splits: describes {sorted(self.splits)}, but the source has {sorted(self.source.splits)}"
            )
        if missing := sorted(set(self.decontamination.against) - set(self.splits)):
            raise ValueError(f"decontamination.against: there is no split {', '.join(missing)}")
        match self.source:
            case TableSource(fields=fields):
                demonstrations, preferences = fields.response is not None, fields.preference is not None
            case OwnSource():
                demonstrations = preferences = True
            case GeneratorSource(name=name):
                demonstrations, preferences = True, generator(name).preferences is not None
            case ReasoningGymSource(solution=solution):
                demonstrations, preferences = solution is not None, False
        if "sft" in self.stages and not demonstrations:
            raise ValueError("stages: sft needs demonstrations, and the source has none")
        if "reward_model" in self.stages and not preferences:
            raise ValueError("stages: reward_model needs preferences, and the source has none")
        if "reward_model" in self.stages and self.instruction is not None:
            raise ValueError("instruction: preferences are about answers that were given without it")
        return self


def load_card(name_or_path: str | Path, cards_dir: Path = CARDS) -> DataCard:
    """The card of that name in `cards_dir`, or in the file of that path (which ends in .md).

    Raises UserError, with the file and what is wrong in it.
    """
    path = Path(name_or_path)
    if path.suffix != ".md":
        path = cards_dir / f"{name_or_path}.md"
        if not path.is_file():
            names = _names(cards_dir)
            raise UserError(
                f"no data card {str(name_or_path)!r} in {cards_dir}{nearest(str(name_or_path), names)}. "
                f"Cards: {', '.join(names) or 'none'}. A card elsewhere is named by its path, ending in .md"
            )
    card = check(DataCard, _front_matter(path), where=str(path), context=path.parent)
    if card.name != path.stem:
        raise UserError(f"{path}: the card is named {card.name!r}: its file must be {card.name}.md")
    return card


def list_cards(cards_dir: Path = CARDS) -> list[DataCard]:
    """All cards of the directory, by name."""
    return [load_card(name, cards_dir) for name in _names(cards_dir)]


def require_stage(card: DataCard, stage: Stage) -> None:
    """Raises UserError where the card is not meant for `stage`."""
    if stage not in card.stages:
        learner = "reward models and DPO, which need pairs" if stage == "reward_model" else stage
        raise UserError(f"{card.called} is not for {learner}, only for {', '.join(card.stages)}")


def check(model: type[Model], data: Any, *, where: str, context: Path | None = None) -> Model:
    """`data` as a `model`. Raises UserError that says `where` and names each key that is wrong."""
    try:
        return model.model_validate(data, context=context)
    except ValidationError as error:
        raise UserError(f"{where}: " + "; ".join(_problem(detail) for detail in error.errors())) from None


def _front_matter(path: Path) -> Any:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read data card {path}: {error}") from error
    if lines[:1] != ["---"] or "---" not in lines[1:]:
        raise UserError(f"{path}: a data card starts with YAML between two lines of ---")
    try:
        # The opening line stays as YAML's own mark of a document, so that YAML counts lines as the file does.
        return yaml.safe_load("\n".join(lines[: lines.index("---", 1)]))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: the front matter is not YAML: {error}") from error


def _problem(detail: Any) -> str:
    parts = [str(part) for part in detail["loc"]]
    if parts[:1] == ["source"]:
        # Pydantic names the chosen kind of source as if it were a key.
        del parts[1:2]
    message = detail["msg"].removeprefix("Value error, ")
    return f"{'.'.join(parts)}: {message}" if parts else message


def _names(cards_dir: Path) -> list[str]:
    return sorted(path.stem for path in cards_dir.glob("*.md"))


def _beside(directory: Path, split: Any) -> Any:
    match split:
        case {"from": str(table)}:
            return split | {"from": str(directory / table)}
    return split
