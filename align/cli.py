"""The `align` command."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from pydantic import ValidationError

from align.errors import Terminated, UserError
from align.recipe import (
    STAGES,
    ModelOptions,
    Recipe,
    check_model_directory,
    load_pipeline,
    load_recipe,
    load_stage,
)
from align.run.files import redacted
from align.session.resume import RESUME, as_begun
from reward import RewardTerm
from reward.registry import Entry
from rollout import EngineOptions, FleetOptions, SamplingOptions

EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 75
OUR_PACKAGES = ("align", "rollout", "reward")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    options = parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except KeyboardInterrupt as stopped:
        print("interrupted: everything was stopped", file=sys.stderr)
        return EXIT_TERMINATED if isinstance(stopped, Terminated) else EXIT_INTERRUPTED
    except UserError as error:
        print(f"error: {redacted(str(error))}", file=sys.stderr)
        return EXIT_USER_ERROR
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in OUR_PACKAGES:
            raise
        print(f"stopped: {redacted(str(error))}", file=sys.stderr)
        return EXIT_FAILED
    return status


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    top = argparse.ArgumentParser(
        prog="align",
        description="The alignment stages of DeepSeek-V2: SFT, then GRPO, on Ray, vLLM and DeepSpeed.",
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for name, run, text in (
        ("sft", run_recipe, "supervised fine-tuning of a policy"),
        ("grpo", run_recipe, "reinforcement learning with GRPO, after SFT where the recipe says so"),
        ("reward-model", run_recipe, "a reward model from preferences, made of a policy"),
        ("preferences", run_recipe, "preference data from a policy's own answers, judged by the recipe's rewards"),
        ("check", check, "read a recipe and say what is wrong with it; starts nothing"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("recipe", type=Path, help="recipe file, for example recipes/nano/grpo.yaml")
        command.add_argument("overrides", nargs="*", metavar="key=value", help="for example grpo.steps=20 seed=1")
        command.set_defaults(run=run, stage=name.replace("-", "_"))
    again = commands.add_parser(
        "resume",
        help="go on with an interrupted run, from its last checkpoint",
        description=RESUME,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    again.add_argument("directory", type=Path, help="run directory, for example runs/nano-grpo", metavar="RUN")
    again.add_argument("overrides", nargs="*", metavar="key=value", help="for example save_every=20 run.grace_s=60")
    again.set_defaults(run=resume)
    space = commands.add_parser(
        "plan", help="where a recipe's processes go on a cluster, their memory and time; starts nothing"
    )
    space.add_argument("recipe", type=Path, help="recipe file, for example recipes/v2_lite/sft.yaml")
    space.add_argument("overrides", nargs="*", metavar="key=value", help="for example learner.ranks=16")
    space.add_argument("--nodes", type=int, default=1)
    space.add_argument("--gpus-per-node", type=int, required=True, help="0 for one machine without GPUs")
    space.add_argument("--gpu-memory", type=float, default=0.0, metavar="GIB", help="of each GPU, for example 80")
    space.set_defaults(run=plan)
    chain = commands.add_parser("pipeline", help="run the stages that a file names, one after the other")
    chain.add_argument("file", type=Path, help="pipeline file, for example recipes/nano/pipeline.yaml")
    chain.add_argument("overrides", nargs="*", metavar="key=value", help="for example seed=1 run.dir=runs/second")
    chain.add_argument("--from", dest="start", metavar="STAGE", help="run this stage and all after it anew")
    chain.add_argument("--to", dest="last", metavar="STAGE", help="stop after this stage")
    chain.set_defaults(run=pipeline)
    merge = commands.add_parser("merge", help="write a LoRA adapter and its base as one Hugging Face checkpoint")
    merge.add_argument("adapter", type=Path, help="directory of an adapter as PEFT writes it: RUN/final/adapter")
    merge.add_argument("out", type=Path, help="directory to write to")
    merge.add_argument("--base", help="directory or hub name of the base, where it is not what the adapter names")
    merge.set_defaults(run=merge_adapter)
    examine = commands.add_parser(
        "doctor", help="check that a model is fit to be trained and that the engines agree on it"
    )
    examine.add_argument("model", help="Hugging Face directory or hub name, with weights")
    examine.set_defaults(run=doctor)
    answer = commands.add_parser("eval", help="let a model answer a file of problems and score the answers")
    answer.add_argument("--model", required=True, help="Hugging Face directory or hub name")
    answer.add_argument("--data", type=Path, required=True, help='JSONL: {"id", "prompt" or "messages", "answer"}')
    answer.add_argument(
        "--out", type=Path, required=True, help="JSONL to write: completion, reward and verdict of each"
    )
    answer.add_argument("--max-new-tokens", type=int, default=64)
    answer.set_defaults(run=evaluate)
    talk = commands.add_parser("chat", help="talk with a model in the terminal")
    talk.add_argument("--model", required=True, help="Hugging Face directory or hub name")
    talk.add_argument("--system", help="what the system message says; the template's own when not given")
    talk.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest token each time")
    talk.add_argument("--max-new-tokens", type=int, default=256, help="longest answer")
    talk.add_argument("--seed", type=int, default=0)
    talk.set_defaults(run=chat)
    turn = commands.add_parser("convert", help="turn a GGUF file into a Hugging Face directory, and say what is lost")
    turn.add_argument("file", type=Path, help="for example SmolLM2-135M-Instruct.Q4_1.gguf", metavar="FILE.gguf")
    turn.add_argument("directory", type=Path, help="to be written; must not be there yet, or be empty", metavar="DIR")
    turn.add_argument("--chat-template", type=Path, metavar="FILE", help="Jinja template, where the model has none")
    turn.set_defaults(run=convert)
    for command in (examine, answer, talk, turn):
        command.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    for command, longest in ((examine, 512), (answer, 512), (talk, 2048)):
        command.add_argument("--max-length", type=int, default=longest, help="prompt and completion, in tokens")
    for command in (examine, answer):
        command.add_argument("--workers", type=int, default=1, help="rollout workers")
    judge = commands.add_parser("score", help="score a file of completions by a registered reward")
    judge.add_argument("--reward", required=True, help="name of a reward; `align rewards list` shows them")
    judge.add_argument("--params", default="{}", help='its parameters as YAML, for example "{partial: true}"')
    judge.add_argument("--data", type=Path, required=True, help='JSONL: {"id", "completion", "answer", "tests", ...}')
    judge.add_argument("--out", type=Path, required=True, help="JSONL to write: value, verdict and detail of each")
    judge.set_defaults(run=score)
    page = commands.add_parser("report", help="write a page about a run: settings, curves, evaluations and its samples")
    page.add_argument("directory", type=Path, help="run directory, for example runs/nano-grpo", metavar="RUN")
    page.add_argument("--out", type=Path, help="HTML file, or directory, to write to; RUN/report.html when not given")
    page.add_argument(
        "--svg", type=Path, help="also plot reward, accuracy and agreement to this SVG file, for a README"
    )
    page.set_defaults(run=report)
    sandbox = commands.add_parser("sandbox", help="the sandbox that runs a model's code")
    actions = sandbox.add_subparsers(required=True, metavar="ACTION")
    actions.add_parser("check", help="say what this machine allows of it").set_defaults(run=check_sandbox)
    rewards = commands.add_parser("rewards", help="the rewards that a recipe can name")
    actions = rewards.add_subparsers(required=True, metavar="ACTION")
    actions.add_parser("list", help="each with its parameters and what it is for").set_defaults(run=list_rewards)
    evaluations = commands.add_parser("evaluations", help="the evaluation hooks that a recipe can name")
    actions = evaluations.add_subparsers(required=True, metavar="ACTION")
    actions.add_parser("list", help="each with its parameters and what it measures").set_defaults(run=list_evaluations)
    return top


def read_recipe(path: Path, overrides: Sequence[str]) -> Recipe:
    """A recipe of which everything it names is there."""
    recipe = load_recipe(path, overrides)
    from align.session.checks import check_names

    check_names(recipe, path)
    return recipe


def run_recipe(options: argparse.Namespace) -> int:
    """`align sft RECIPE`, and so for every other stage."""
    stage = load_stage(options.recipe, options.overrides)
    if stage.recipe.stage != options.stage:
        command = stage.recipe.stage.replace("_", "-")
        raise UserError(
            f"{options.recipe} is a recipe for {stage.recipe.stage}; run `align {command} {options.recipe}`"
        )
    from align.session.checks import check_names
    from align.stages.commands import run_stage

    for part in filter(None, (stage.before, stage)):
        check_names(part.recipe, part.file)
    run_stage(stage)
    return 0


def resume(options: argparse.Namespace) -> int:
    """`align resume RUN`."""
    stage, given = as_begun(options.directory, options.overrides, ("pipeline", *STAGES))
    return pipeline(given) if stage == "pipeline" else run_recipe(given)


def pipeline(options: argparse.Namespace) -> int:
    """`align pipeline FILE`."""
    chain = load_pipeline(options.file, options.overrides)
    from align.session.checks import check_names
    from align.stages.pipeline import run_pipeline

    for stage in chain.stages:
        check_names(stage.recipe, stage.file)
    status = run_pipeline(chain, options.start, options.last)
    if status == 0:
        from align.report import write_report

        print(f"the report is in {write_report(chain.directory)}")
    return status


def check(options: argparse.Namespace) -> int:
    """`align check RECIPE`."""
    recipe = read_recipe(options.recipe, options.overrides)
    print(f"{options.recipe}: a valid {recipe.stage} recipe; its run would go to {recipe.directory}")
    return 0


def plan(options: argparse.Namespace) -> int:
    """`align plan RECIPE --nodes N --gpus-per-node M --gpu-memory G`: 0 where it fits, 1 where it does not."""
    recipe = read_recipe(options.recipe, options.overrides)
    from align.model.sizes import empty_model, model_sizes, read_config
    from align.plan.placement import cluster_of
    from align.plan.plan import as_text, make_plan

    cluster = cluster_of(options.nodes, options.gpus_per_node, options.gpu_memory)
    sizes = model_sizes(empty_model(read_config(recipe.model.path)))
    made = make_plan(recipe, sizes, cluster)
    print(as_text(recipe, sizes, cluster, made), flush=True)
    for refusal in made.refusals:
        print(f"does not fit: {refusal}", file=sys.stderr)
    return EXIT_FAILED if made.refusals else 0


def doctor(options: argparse.Namespace) -> int:
    """`align doctor MODEL`."""
    model, fleet = model_and_fleet(options)
    from align.tools import offline

    print(offline.doctor(model, fleet))
    return 0


def evaluate(options: argparse.Namespace) -> int:
    """`align eval --model DIR --data FILE --out FILE`."""
    model, fleet = model_and_fleet(options)
    from align.tools import offline

    print(offline.evaluate_file(model, options.data, options.out, fleet, options.max_new_tokens))
    return 0


def chat(options: argparse.Namespace) -> int:
    """`align chat --model DIR`."""
    model = model_of(options)
    from align.tools.chat import chat_in_terminal

    try:
        sampling = SamplingOptions(temperature=options.temperature, max_new_tokens=options.max_new_tokens)
        engine = EngineOptions(max_length=options.max_length, batch_sequences=1)
    except ValidationError as error:
        wrong = error.errors()[0]
        raise UserError(f"--{str(wrong['loc'][0]).replace('_', '-')} {wrong['input']}: {wrong['msg']}") from None
    chat_in_terminal(model, engine, sampling, system=options.system, seed=options.seed)
    return 0


def convert(options: argparse.Namespace) -> int:
    """`align convert FILE.gguf DIR`."""
    from align.tools.gguf import convert_gguf

    for line in convert_gguf(options.file, options.directory, dtype=options.dtype, chat_template=options.chat_template):
        print(line)
    return 0


def model_and_fleet(options: argparse.Namespace) -> tuple[ModelOptions, FleetOptions]:
    """The model that a command names and the workers to run it; refuses a directory that lacks something."""
    return model_of(options), FleetOptions(workers=options.workers, max_length=options.max_length)


def model_of(options: argparse.Namespace) -> ModelOptions:
    """The model that a command names. Raises UserError for a directory that lacks something."""
    model = ModelOptions(path=options.model, dtype=options.dtype)
    if Path(options.model).is_dir():
        check_model_directory(Path(options.model), model)
    return model


def merge_adapter(options: argparse.Namespace) -> int:
    """`align merge ADAPTER OUT`."""
    from align.tools.merge import merge_adapter as merge

    origin = merge(options.adapter, options.out, options.base)
    print(f"{options.adapter} on {origin}, merged, is in {options.out}")
    return 0


def score(options: argparse.Namespace) -> int:
    """`align score --reward NAME --data FILE --out FILE`."""
    from align.tools.score_file import score_file

    try:
        params = yaml.safe_load(options.params)
    except yaml.YAMLError:
        params = None
    if not isinstance(params, dict) or not all(isinstance(name, str) for name in params):
        raise UserError(
            f"--params {options.params!r} is no mapping of names to values; write it like {{partial: true}}"
        )
    print(score_file(RewardTerm(name=options.reward, params=params), options.data, options.out))
    return 0


def report(options: argparse.Namespace) -> int:
    """`align report RUN`."""
    from align.report import write_plot, write_report

    print(f"the report is in {write_report(options.directory, options.out)}")
    if options.svg:
        print(f"the plot is in {write_plot(options.directory, options.svg)}")
    return 0


def check_sandbox(options: argparse.Namespace) -> int:
    """`align sandbox check`: 0 where code can be isolated, 1 where it cannot."""
    from reward.isolation import check as check_machine

    pieces = check_machine()
    for piece in pieces:
        state = "yes" if piece.ok else "MISSING" if piece.needed else "no"
        print(f"{state:8}{piece.name}{': ' + piece.detail if piece.detail else ''}")
    return 0 if all(piece.ok for piece in pieces if piece.needed) else EXIT_FAILED


def list_rewards(options: argparse.Namespace) -> int:
    """`align rewards list`."""
    from reward import available

    return show(available())


def list_evaluations(options: argparse.Namespace) -> int:
    """`align evaluations list`."""
    from align.evaluate.hooks import available

    return show(available())


def show(entries: Sequence[Entry]) -> int:
    """Print registered functions with their parameters and descriptions."""
    for item in entries:
        parameters = ", ".join(p.name if p.required else f"{p.name}={p.default!r}" for p in item.parameters)
        print(f"{item.name}({parameters})\n    {item.description}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
