"""Commands that write a recipe for data and a model of one's own."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from align.cli.arguments import A_REWARD, Overrides

OwnData = Annotated[str, Argument(metavar="FILE", help="data, or files by a pattern: any of docs/own_data.md")]
OwnModel = Annotated[str, Argument(metavar="MODEL", help="Hugging Face directory or hub name")]
Lora = Annotated[
    bool | None,
    Option("--lora/--full", help="train adapters, or all parameters; by the size of the model when not given"),
]
Out = Annotated[Path | None, Option(help="recipe to write; my_STAGE.yaml when not given")]
Overwrite = Annotated[bool, Option("--overwrite", help="replace the recipe that is there")]


def from_data_and_model(stage: Literal["sft", "dpo", "reward_model"], text: str) -> Callable[..., None]:
    """The command that writes a recipe of a stage which needs nothing more; `text` is its help."""

    def command(
        file: OwnData,
        model: OwnModel,
        overrides: Overrides = None,
        out: Out = None,
        lora: Lora = None,
        overwrite: Overwrite = False,
    ) -> None:
        write_recipe(stage, file, model, out, overrides, lora, overwrite)

    command.__doc__ = text
    return command


init_sft = from_data_and_model("sft", "a recipe for supervised fine-tuning on conversations")
init_dpo = from_data_and_model("dpo", "a recipe for direct preference optimization on pairs of completions")
init_reward_model = from_data_and_model("reward_model", "a recipe for a reward model from pairs of completions")


def init_grpo(
    file: OwnData,
    model: OwnModel,
    reward: Annotated[str, Option(help=A_REWARD)],
    overrides: Overrides = None,
    out: Out = None,
    lora: Lora = None,
    overwrite: Overwrite = False,
) -> None:
    """a recipe for GRPO on problems, or on the prompts of conversations"""
    write_recipe("grpo", file, model, out, overrides, lora, overwrite, reward)


def write_recipe(
    stage: Literal["sft", "grpo", "dpo", "reward_model"],
    data: str,
    model: str,
    out: Path | None,
    overrides: Sequence[str] | None,
    lora: bool | None,
    overwrite: bool,
    reward: str | None = None,
) -> None:
    """Write a recipe for a stage, and print what it is made of."""
    from rich.console import Console

    from align.tools.init_recipe import init_recipe

    file = out or Path(f"my_{stage}.yaml")
    init_recipe(*(stage, data, model, file, overrides or [], Console()), reward=reward, lora=lora, overwrite=overwrite)
