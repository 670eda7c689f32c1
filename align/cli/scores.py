"""Scoring what was answered before, by any reward; and what a recipe's rewards pay for."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from align.cli.arguments import A_REWARD, BELOW_RUN, File, Overrides, Params, Timeout
from align.errors import UserError

if TYPE_CHECKING:
    from reward import RewardTerm


def score(
    reward: Annotated[str, Option(help=A_REWARD)],
    run: Annotated[Path | None, Argument(metavar="RUN", help="run directory, in the place of --data")] = None,
    data: Annotated[
        Path | None, Option(help='completions: a file of rows like {"id", "completion", "ground_truth", ...}')
    ] = None,
    out: Annotated[Path | None, Option(help=f"JSONL to write: value, verdict and detail of each{BELOW_RUN}")] = None,
    params: Params = "{}",
    timeout: Timeout = None,
) -> None:
    """score a file of completions, or a run's stored samples, by a reward

    Of a run, the mean of each step is printed: what its curve would have been under another reward.
    """
    from align.tools.score_file import default_out, score_file, score_run

    if (run is None) == (data is None):
        raise UserError("give either a run directory or --data FILE")
    term = reward_term(reward, params, timeout)
    if run is not None:
        for line in score_run(term, run, out or default_out(run, term.component)):
            print(line)
    elif data is not None:
        below = run_of(str(data))
        if out is None and below is None:
            raise UserError(f"--out is missing: {data} is in no run, below which the scores would be written")
        print(score_file(term, data, out or default_out(below or data, f"{data.stem}-{term.component}")))


def probe(
    recipe: File,
    overrides: Overrides = None,
    answers: Annotated[
        Path | None,
        Option(
            metavar="FILE",
            help="answers to change: a file as `align score` reads it; sampled from the start policy when not given",
        ),
    ] = None,
    prompts: Annotated[int | None, Option(min=2, help="prompts of the recipe that are answered (64)")] = None,
    samples: Annotated[int | None, Option(min=1, help="answers to each (2)")] = None,
    trick: Annotated[
        list[str] | None,
        Option(metavar="FILE:FUNCTION", help="one more trick: my_tricks.py:with_thanks; can be given several times"),
    ] = None,
    out: Annotated[Path | None, Option(metavar="FILE", help="JSON to write the numbers to")] = None,
) -> None:
    """which cheap tricks the rewards of a GRPO recipe pay for

    Answers of the policy that the recipe starts from are changed by cheap tricks: wrapped, doubled, cut, put in capitals, the prompt
    before them, and more. For each trick: how much it moves each reward on average, and the mean advantage that changed answers have in
    groups beside the unchanged ones, with 95 % intervals by prompt.
    """
    from rich.console import Console

    from align.recipe import load_stage
    from align.tools.probe import probe_recipe

    stage = load_stage(recipe, overrides or [])
    probe_recipe(stage, Console(), answers=answers, prompts=prompts, samples=samples, tricks=trick or [], out=out)


def reward_term(name: str, params: str, timeout_s: float | None) -> "RewardTerm":
    """A reward by name, with parameters as YAML. Raises UserError where they are no mapping, and for a time limit of what has none."""
    import yaml
    from pydantic import ValidationError

    from align.recipe.values import yaml_value
    from reward import RewardTerm

    try:
        given = yaml_value(params)
    except yaml.YAMLError:
        given = None
    if not isinstance(given, dict) or not all(isinstance(name, str) for name in given):
        raise UserError(f"--params {params!r} is no mapping of names to values; write it like {{partial: true}}")
    try:
        return RewardTerm(name=name, params=given, timeout_s=timeout_s)
    except ValidationError:
        raise UserError(
            f"--timeout is a number of seconds for a call of a function in a file, and {name} is none: leave it out"
        ) from None


def run_of(path: str) -> Path | None:
    """The innermost run directory that a path is in; None where it is in none."""
    from align.run import read_status

    return next((parent for parent in Path(path).absolute().parents if read_status(parent) is not None), None)
