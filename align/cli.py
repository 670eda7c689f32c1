"""The `align` command. What a command needs is imported when it runs, so that `align --help` answers at once."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Argument, Option
from typer.core import TyperCommand

from align.errors import ENGINES, Terminated, UserError, check_installed, not_installed

if TYPE_CHECKING:
    from align.recipe import ModelOptions
    from reward import RewardTerm
    from reward.registry import Entry

EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 75
OUR_PACKAGES = ("align", "rollout", "reward")
STAGES = {
    "sft": "supervised fine-tuning of a policy",
    "grpo": "reinforcement learning with GRPO, after SFT where the recipe says so",
    "reward-model": "a reward model from preferences, made of a policy",
    "preferences": "preference data from a policy's own answers, judged by the recipe's rewards",
}


def shipped_file(path: Path) -> Path:
    """The file of that name, or the one that comes with the package."""
    from align.shipped import found

    return found(path)


File = Annotated[
    Path, Argument(metavar="FILE", help="recipe file, for example recipes/nano/grpo.yaml", callback=shipped_file)
]
Overrides = Annotated[list[str] | None, Argument(metavar="key=value", help="for example grpo.steps=20 seed=1")]
RunPath = Annotated[Path, Argument(metavar="RUN", help="run directory, for example runs/nano-grpo")]
Model = Annotated[str, Option(help="Hugging Face directory or hub name")]
Dtype = Annotated[Literal["float32", "bfloat16"], Option()]
MaxLength = Annotated[int, Option(min=16, help="prompt and completion, in tokens")]
A_REWARD = "name of a reward, as `align rewards list` shows them, or a function of one's own: my_rewards.py:my_function"
BELOW_RUN = "; a new file in the run's scores/ when not given"
Params = Annotated[str, Option(help='the reward\'s parameters as YAML, for example "{partial: true}"')]
Workers = Annotated[int, Option(min=1, help="rollout workers")]


def application(text: str) -> typer.Typer:
    """A command line, or a part of one, in plain text."""
    settings: dict[Any, Any] = {"help_option_names": ["-h", "--help"], "terminal_width": 110}
    return typer.Typer(help=text, add_completion=False, rich_markup_mode=None, context_settings=settings)


app = application("The alignment stages of DeepSeek-V2: SFT, then GRPO, on Ray, vLLM and DeepSpeed.")
app.add_typer(sandbox := application("the sandbox that runs a model's code"), name="sandbox")
app.add_typer(rewards := application("the rewards that a recipe can name"), name="rewards")
app.add_typer(init := application("write a recipe for one's own data and model, and say what is in them"), name="init")
app.add_typer(data := application("the data that a recipe can name, and one's own"), name="data")
app.add_typer(evaluations := application("the evaluation hooks that a recipe can name"), name="evaluations")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    command = typer.main.get_command(app)
    try:
        with command.make_context("align", list(sys.argv[1:] if arguments is None else arguments)) as context:
            return command.invoke(context) or 0
    except typer.Exit as done:
        return done.exit_code
    except typer.TyperException as error:
        used = getattr(error, "ctx", None)
        print(f"{used.get_usage()}\n" if used else "", f"error: {error.format_message()}", sep="", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt as stopped:
        print("interrupted: everything was stopped", file=sys.stderr)
        return EXIT_TERMINATED if isinstance(stopped, Terminated) else EXIT_INTERRUPTED
    except UserError as error:
        say(f"error: {error}")
        return EXIT_USER_ERROR
    except ModuleNotFoundError as error:
        engine = (error.name or "").partition(".")[0]
        if engine not in ENGINES:
            raise
        say(f"error: {not_installed(engine)}")
        return EXIT_USER_ERROR
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in OUR_PACKAGES:
            raise
        say(f"stopped: {error}")
        return EXIT_FAILED


def say(text: str) -> None:
    """A line for whoever waits at the terminal, without secrets."""
    from align.run.files import redacted

    print(redacted(text), file=sys.stderr)


class StageCommand(TyperCommand):
    """The command of a stage, whose help ends with the keys of its recipe."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        from align.recipe.keys import stage_text

        formatter.write(f"\nKeys of the recipe, with their defaults:\n{stage_text(str(self.name).replace('-', '_'))}\n")


def stage_command(stage: str) -> Callable[..., None]:
    def run(recipe: File, overrides: Overrides = None) -> None:
        run_recipe(stage, recipe, overrides or [])

    return run


for name, text in STAGES.items():
    app.command(name, help=text, cls=StageCommand)(stage_command(name.replace("-", "_")))


def run_recipe(stage: str, file: Path, overrides: Sequence[str], *, longer: bool = False) -> None:
    """Run a recipe for a stage; with `longer`, go on with a run that has finished."""
    from align.recipe import load_stage

    planned = load_stage(file, overrides)
    if planned.recipe.stage != stage:
        command = planned.recipe.stage.replace("_", "-")
        raise UserError(f"{file} is a recipe for {planned.recipe.stage}; run `align {command} {file}`")
    from align.stages.commands import run_stage

    run_stage(planned, longer=longer)


@app.command()
def check(
    file: File,
    overrides: Overrides = None,
    whole: Annotated[
        bool, Option("--whole", help="read all rows of the data, not the first thousand of each file")
    ] = False,
) -> None:
    """read a recipe or a pipeline and say what is wrong with it or with this machine; starts nothing

    Looks at all that a run looks at before it starts: keys, names, splits, servers, free memory, disk space and ports, the model's small
    files (configuration, tokenizer, chat template), and the data: their rows in the chat template, and the columns that rewards want.
    """
    from align.recipe import load_stages
    from align.stages.commands import check_stages

    stages = load_stages(file, overrides or [])
    found = check_stages(stages, whole=whole)
    for stage in stages:
        print(f"{stage.file}: a valid {stage.recipe.stage} recipe; its run would go to {stage.directory}")
    for text in found.warnings:
        print(f"warning: {text}")
    for note in found.notes:
        print(note)


OwnData = Annotated[str, Argument(metavar="FILE", help="data, or files by a pattern: any of docs/own_data.md")]
OwnModel = Annotated[str, Argument(metavar="MODEL", help="Hugging Face directory or hub name")]
Lora = Annotated[
    bool | None,
    Option("--lora/--full", help="train adapters, or all parameters; by the size of the model when not given"),
]
Out = Annotated[Path | None, Option(help="recipe to write; my_STAGE.yaml when not given")]
Overwrite = Annotated[bool, Option("--overwrite", help="replace the recipe that is there")]


@init.command("sft")
def init_sft(
    file: OwnData,
    model: OwnModel,
    overrides: Overrides = None,
    out: Out = None,
    lora: Lora = None,
    overwrite: Overwrite = False,
) -> None:
    """a recipe for supervised fine-tuning on conversations"""
    write_recipe("sft", file, model, out, overrides, lora, overwrite)


@init.command("grpo")
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


@init.command("reward-model")
def init_reward_model(
    file: OwnData,
    model: OwnModel,
    overrides: Overrides = None,
    out: Out = None,
    lora: Lora = None,
    overwrite: Overwrite = False,
) -> None:
    """a recipe for a reward model from pairs of completions"""
    write_recipe("reward_model", file, model, out, overrides, lora, overwrite)


def write_recipe(
    stage: Literal["sft", "grpo", "reward_model"],
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


@app.command()
def keys(
    prefix: Annotated[str, Argument(metavar="PREFIX", help="only those that begin so, for example learner.lora.")] = "",
) -> None:
    """the keys of the recipes of all stages, with their defaults and descriptions"""
    from align.recipe.keys import prefix_text

    print(prefix_text(prefix))


@app.command()
def resume(run: RunPath, overrides: Overrides = None) -> int | None:
    """go on with an interrupted run, or make a finished one longer, from its last checkpoint

    Go on with a run that was interrupted, killed or has failed, from its last checkpoint and with the recipe in its directory. It ends
    with the weights, samples and numbers of a run that was never interrupted, to the last bit where the engines are exact. The command
    that began the run does the same when it is given again; so does `align pipeline` for its stages.

    Checkpoints are written every `save_every` steps, and when the run is told to stop: Ctrl-C (exit status 130) and SIGTERM (75) let the
    step end that is being made, for `run.grace_s` seconds at most, and then write one. A second signal ends at once.

    Damage: every file is verified against its SHA-256 before it is read; a damaged checkpoint is named and the one before taken.

    A finished run goes on where it gets more steps: grpo.steps=80 (sft.steps, reward_model.steps). Its final/ stays until the longer run has
    written its own. The learning rate is that of the longer run from there on: a constant one stays, a cosine rises again.

    Changes: a key that matters must be what it was; run.allow_changes=true goes on nevertheless. Where a run goes, its machine, workers,
    time-outs and save_every may always change; learner.ranks and learner.zero_stage never.
    """
    from align.recipe import STAGES, read_yaml
    from align.run import RunDirectory, read_status

    status = read_status(run)
    if status is None:
        raise UserError(f"{run} holds no run; `align resume` takes the directory of one, such as runs/nano-grpo")
    file, finished = RunDirectory(run).recipe_file, status["state"] == "finished"
    stage, given = read_yaml(file)[0].get("stage"), [f"run.dir={run}", *(overrides or [])]
    if stage == "pipeline":
        if finished:
            raise UserError(
                f"{run} has finished. Its stages can be made longer: `align resume {run}/STAGE grpo.steps=N`"
            )
        return pipeline(file, given)
    if stage not in STAGES:
        raise UserError(f"{file}: stage must be one of pipeline, {', '.join(STAGES)}, but is {stage!r}")
    run_recipe(stage, file, ["run.overwrite=false", *given], longer=finished)
    return None


@app.command()
def plan(
    file: File,
    gpus_per_node: Annotated[int, Option(min=0, help="0 for one machine without GPUs")],
    overrides: Overrides = None,
    nodes: Annotated[int, Option(min=1)] = 1,
    gpu_memory: Annotated[float, Option(metavar="GIB", help="of each GPU, for example 80")] = 0.0,
) -> int:
    """where a recipe's processes go on a cluster, their memory and time; starts nothing

    The exit status is 0 where it fits, 1 where it does not.
    """
    from align.model.sizes import empty_model, model_sizes, read_config
    from align.plan.placement import cluster_of
    from align.plan.plan import as_text, make_plan
    from align.recipe import load_recipe
    from align.session.checks import check_names

    read = load_recipe(file, overrides or [])
    check_names(read)
    cluster = cluster_of(nodes, gpus_per_node, gpu_memory)
    sizes = model_sizes(empty_model(read_config(read.model.path)))
    made = make_plan(read, sizes, cluster)
    print(as_text(f"{read.name} ({read.stage})", read.model.dtype, sizes, cluster, made), flush=True)
    for refusal in made.refusals:
        print(f"does not fit: {refusal}", file=sys.stderr)
    return EXIT_FAILED if made.refusals else 0


@app.command()
def pipeline(
    file: Annotated[
        Path,
        Argument(metavar="FILE", help="pipeline file, for example recipes/nano/pipeline.yaml", callback=shipped_file),
    ],
    overrides: Overrides = None,
    start: Annotated[str | None, Option("--from", metavar="STAGE", help="run it and all after it anew")] = None,
    last: Annotated[str | None, Option("--to", metavar="STAGE", help="stop after this stage")] = None,
) -> int:
    """run the stages that a file names, one after the other"""
    from align.recipe import load_pipeline
    from align.report import write_report
    from align.stages.pipeline import run_pipeline

    chain = load_pipeline(file, overrides or [])
    status = run_pipeline(chain, start, last)
    if status == 0:
        print(f"the report is in {write_report(chain.directory)}")
    return status


@app.command()
def merge(
    adapter: Annotated[Path, Argument(help="directory of an adapter as PEFT writes it: RUN/final/adapter")],
    out: Annotated[Path, Argument(help="directory to write to")],
    base: Annotated[str | None, Option(help="the base, where it is not what the adapter names")] = None,
) -> None:
    """write a LoRA adapter and its base as one Hugging Face checkpoint"""
    from align.tools.merge import merge_adapter

    print(f"{adapter} on {merge_adapter(adapter, out, base)}, merged, is in {out}")


@app.command()
def doctor(
    model: Annotated[str, Argument(help="Hugging Face directory or hub name, with weights")],
    dtype: Dtype = "float32",
    max_length: MaxLength = 512,
    workers: Workers = 1,
) -> None:
    """check that a model is fit to be trained and that the engines agree on it"""
    from align.tools import offline
    from rollout import FleetOptions

    print(offline.doctor(model_of(model, dtype), FleetOptions(workers=workers, max_length=max_length)))


@app.command("eval")
def evaluate(
    model: Model,
    data: Annotated[str, Option(help="problems: any file of docs/own_data.md, or a data card")],
    out: Annotated[
        Path | None, Option(help=f"JSONL to write: completion, reward and verdict of each{BELOW_RUN}")
    ] = None,
    reward: Annotated[str, Option(help=A_REWARD)] = "exact_answer",
    params: Params = "{}",
    samples: Annotated[int, Option(min=0, help="answers to sample beside the greedy one, for pass@k")] = 0,
    temperature: Annotated[
        float | None, Option(min=0.01, max=10, help="of the sampled answers; 1 when not given")
    ] = None,
    split: Annotated[
        Literal["train", "validation", "test"] | None, Option(help="of a data card; test when not given")
    ] = None,
    max_new_tokens: Annotated[int, Option(min=1)] = 64,
    dtype: Dtype = "float32",
    max_length: MaxLength = 512,
    workers: Workers = 1,
) -> None:
    """let a model answer a file of problems and score the answers

    An answer is right where the reward's verdict is "pass". `align score` takes the file that is written, and any other reward.
    """
    from align.tools import offline
    from align.tools.score_file import default_out
    from rollout import FleetOptions

    if temperature is not None and not samples:
        raise UserError("--temperature has no effect on greedy answers: give --samples too, or leave it out")
    term = reward_term(reward, params)
    if out is None:
        if (run := run_of(model)) is None:
            raise UserError(f"--out is missing: {model} is in no run, below which the answers would be written")
        out = default_out(run, f"eval-{Path(data).stem}-{term.component}")
    fleet = FleetOptions(workers=workers, max_length=max_length)
    print(
        offline.evaluate_file(
            *(model_of(model, dtype), data, out, fleet, max_new_tokens, term),
            split=split,
            samples=samples,
            temperature=temperature or 1.0,
        )
    )


@app.command()
def chat(
    model: Model,
    system: Annotated[str | None, Option(help="the system message; the template's own when not given")] = None,
    temperature: Annotated[float, Option(min=0, max=10, help="0 takes the likeliest token each time")] = 0.7,
    max_new_tokens: Annotated[int, Option(min=1, help="longest answer")] = 256,
    seed: int = 0,
    dtype: Dtype = "float32",
    max_length: MaxLength = 2048,
) -> None:
    """talk with a model in the terminal"""
    from align.tools.chat import chat_in_terminal
    from rollout import EngineOptions, SamplingOptions

    sampling = SamplingOptions(temperature=temperature, max_new_tokens=max_new_tokens)
    engine = EngineOptions(max_length=max_length, batch_sequences=1)
    chat_in_terminal(model_of(model, dtype), engine, sampling, system=system, seed=seed)


@app.command()
def convert(
    file: Annotated[Path, Argument(metavar="FILE.gguf", help="for example SmolLM2-135M-Instruct.Q4_1.gguf")],
    directory: Annotated[Path, Argument(metavar="DIR", help="to be written; must not be there yet, or be empty")],
    chat_template: Annotated[Path | None, Option(metavar="FILE", help="Jinja, where the model has none")] = None,
    dtype: Dtype = "float32",
) -> None:
    """turn a GGUF file into a Hugging Face directory, and say what is lost"""
    from align.tools.gguf import convert_gguf

    for line in convert_gguf(file, directory, dtype=dtype, chat_template=chat_template):
        print(line)


@app.command()
def score(
    reward: Annotated[str, Option(help=A_REWARD)],
    run: Annotated[Path | None, Argument(metavar="RUN", help="run directory, in the place of --data")] = None,
    data: Annotated[
        Path | None, Option(help='completions: a file of rows like {"id", "completion", "ground_truth", ...}')
    ] = None,
    out: Annotated[Path | None, Option(help=f"JSONL to write: value, verdict and detail of each{BELOW_RUN}")] = None,
    params: Params = "{}",
) -> None:
    """score a file of completions, or a run's stored samples, by a reward

    Of a run, the mean of each step is printed: what its curve would have been under another reward.
    """
    from align.tools.score_file import default_out, score_file, score_run

    if (run is None) == (data is None):
        raise UserError("give either a run directory or --data FILE")
    term = reward_term(reward, params)
    if run is not None:
        for line in score_run(term, run, out or default_out(run, term.component)):
            print(line)
    elif data is not None:
        below = run_of(str(data))
        if out is None and below is None:
            raise UserError(f"--out is missing: {data} is in no run, below which the scores would be written")
        print(score_file(term, data, out or default_out(below or data, f"{data.stem}-{term.component}")))


def reward_term(name: str, params: str) -> "RewardTerm":
    """A reward by name, with parameters as YAML. Raises UserError where they are no mapping."""
    import yaml

    from reward import RewardTerm

    try:
        given = yaml.safe_load(params)
    except yaml.YAMLError:
        given = None
    if not isinstance(given, dict) or not all(isinstance(name, str) for name in given):
        raise UserError(f"--params {params!r} is no mapping of names to values; write it like {{partial: true}}")
    return RewardTerm(name=name, params=given)


def run_of(path: str) -> Path | None:
    """The innermost run directory that a path is in; None where it is in none."""
    from align.run import read_status

    return next((parent for parent in Path(path).absolute().parents if read_status(parent) is not None), None)


@app.command()
def report(
    run: RunPath,
    out: Annotated[Path | None, Option(help="HTML file or directory; RUN/report.html when not given")] = None,
    svg: Annotated[Path | None, Option(help="also plot reward, accuracy and agreement to this file")] = None,
    serve: Annotated[
        bool, Option("--serve", help="show the page in a browser on this machine, following the run")
    ] = False,
    port: Annotated[int | None, Option(min=1, max=65535, help="for --serve; a free one when not given")] = None,
) -> None:
    """write a page about a run: settings, curves, evaluations and its samples

    With --serve nothing is written: the page is at the address that is printed until Ctrl-C, and new steps, samples and warnings appear in it.
    """
    from align.report import serve_report, write_plot, write_report

    if serve and (out is not None or svg is not None):
        raise UserError("--serve writes no files: leave --out and --svg out, or give them without it")
    if serve:
        serve_report(run, port or 0)
        return
    if port is not None:
        raise UserError("--port has no effect without --serve")
    print(f"the report is in {write_report(run, out)}")
    if svg is not None:
        print(f"the plot is in {write_plot(run, svg)}")


@app.command()
def publish(
    run: RunPath,
    to: Annotated[str | None, Option(metavar="NAME/REPO", help="repository of the Hugging Face hub to push to")] = None,
    public: Annotated[bool, Option("--public", help="for everybody; private when not given")] = False,
    overwrite: Annotated[bool, Option("--overwrite", help="replace files that the repository has")] = False,
    new_card: Annotated[bool, Option("--new-card", help="write the card anew where it has been edited")] = False,
) -> None:
    """write a model card beside a run's final weights, and push both to the Hugging Face hub

    Without --to nothing leaves the machine. Look at final/README.md, and edit it, before you push it.
    """
    from align.tools.publish import publish as publish_run

    if to is None and (public or overwrite):
        raise UserError("--public and --overwrite have no effect without --to: name the repository, or leave them out")
    publish_run(run, to, public=public, overwrite=overwrite, new_card=new_card, tell=print)


@sandbox.command("check")
def check_sandbox() -> int:
    """say what this machine allows of it: the exit status is 0 where code can be isolated, 1 where it cannot"""
    from reward.isolation import check as check_machine

    pieces = check_machine()
    for piece in pieces:
        state = "yes" if piece.ok else "MISSING" if piece.needed else "no"
        print(f"{state:8}{piece.name}{': ' + piece.detail if piece.detail else ''}")
    return 0 if all(piece.ok for piece in pieces if piece.needed) else EXIT_FAILED


@data.command("show")
def show_data(
    name: Annotated[str, Argument(metavar="FILE|CARD", help="file, files by a pattern, directory, or a data card")],
    model: Annotated[
        str | None, Option(help="model directory or hub name: lengths in tokens, and a row in its template")
    ] = None,
) -> None:
    """what is in data, how a run would read them, and what it would refuse"""
    from rich.console import Console

    from align.tools.show_data import show_data as show_it

    show_it(name, model, Console())


@data.command("list")
def list_data() -> None:
    """the data cards that come with the project"""
    from rich.console import Console

    from align.tools.show_data import show_cards

    show_cards(Console())


@rewards.command("list")
def list_rewards() -> None:
    """each with its parameters and what it is for"""
    from reward import available

    show(available())


@evaluations.command("list")
def list_evaluations() -> None:
    """each with its parameters and what it measures"""
    from align.evaluate.hooks import available

    show(available())


def show(entries: "Sequence[Entry]") -> None:
    """Print registered functions with their parameters and descriptions."""
    for item in entries:
        parameters = ", ".join(p.name if p.required else f"{p.name}={p.default!r}" for p in item.parameters)
        print(f"{item.name}({parameters})\n    {item.description}")


def model_of(path: str, dtype: Literal["float32", "bfloat16"]) -> "ModelOptions":
    """The model that a command names. Raises UserError for a directory that lacks something, and where no engine is installed to load it."""
    check_installed(ENGINES)
    from align.recipe import ModelOptions, check_model_directory

    model = ModelOptions(path=path, dtype=dtype)
    if Path(path).is_dir():
        check_model_directory(Path(path), model)
    return model


if __name__ == "__main__":
    sys.exit(main())
