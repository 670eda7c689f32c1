"""Commands on models: check one, talk with it, let it answer problems, turn its files into others."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Argument, Option

from align.cli.arguments import A_REWARD, BELOW_RUN, Dtype, MaxLength, Model, Params, Timeout, TrustRemoteCode, Workers
from align.cli.scores import reward_term, run_of
from align.errors import ENGINES, UserError, check_installed

if TYPE_CHECKING:
    from align.recipe import ModelOptions


def doctor(
    model: Annotated[str, Argument(help="Hugging Face directory or hub name, with weights")],
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        Option(help="when not given: bfloat16 on a GPU where the weights are stored so, else float32"),
    ] = None,
    max_length: MaxLength = 512,
    workers: Workers = 1,
    agreement: Annotated[
        bool, Option("--agreement", help="also say how far both engines are apart in each part of each layer")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """check that a model is fit to be trained and that the engines agree on it"""
    check_installed(ENGINES)
    from align.model.policy import dtype_here
    from align.tools import offline
    from rollout import FleetOptions

    print(
        offline.doctor(
            model_of(model, dtype or dtype_here(model, trust_remote_code=trust_remote_code), trust_remote_code),
            FleetOptions(workers=workers, max_length=max_length),
            by_part=agreement,
        )
    )


def evaluate(
    model: Model,
    data: Annotated[str, Option(help="problems: any file of docs/own_data.md, or a data card")],
    out: Annotated[
        Path | None, Option(help=f"JSONL to write: completion, reward and verdict of each{BELOW_RUN}")
    ] = None,
    reward: Annotated[str, Option(help=A_REWARD)] = "exact_answer",
    params: Params = "{}",
    timeout: Timeout = None,
    samples: Annotated[int, Option(min=0, help="answers to sample beside the greedy one, for pass@k")] = 0,
    temperature: Annotated[
        float | None, Option(min=0.01, max=2, help="of the sampled answers; 1 when not given")
    ] = None,
    split: Annotated[
        Literal["train", "validation", "test"] | None, Option(help="of a data card; test when not given")
    ] = None,
    max_new_tokens: Annotated[int | None, Option(min=1, help="longest answer; of another model 64")] = None,
    dtype: Annotated[Literal["float32", "bfloat16"] | None, Option(help="of another model float32")] = None,
    max_length: Annotated[
        int | None, Option(min=16, help="prompt and completion, in tokens; of another model 512")
    ] = None,
    workers: Workers = 1,
    tensor_parallel: Annotated[
        int, Option(min=1, help="processes that hold one copy of the model together, each on a GPU where there are any")
    ] = 1,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """let a model answer a file of problems and score the answers

    An answer is right where the reward's verdict is "pass". `align score` takes the file that is written, and any other reward. A model of a run
    answers as in the run's own evaluations: in its dtype, and as long, unless told otherwise.
    """
    from align.tools import offline
    from align.tools.score_file import default_out
    from rollout import FleetOptions

    if temperature is not None and not samples:
        raise UserError("--temperature has no effect on greedy answers: give --samples too, or leave it out")
    refuse_too_low(temperature or 1.0)
    term, run = reward_term(reward, params, timeout), run_of(model)
    if out is None:
        if run is None:
            raise UserError(f"--out is missing: {model} is in no run, below which the answers would be written")
        out = default_out(run, f"eval-{Path(data).stem}-{term.component}")
    asked = offline.asked_in(run)
    longest = {} if max_length is None else {"max_length": max_length}
    fleet = FleetOptions(**asked["rollout"] | longest | {"workers": workers, "tensor_parallel": tensor_parallel})
    print(
        offline.evaluate_file(
            *(
                model_of(model, dtype or asked["dtype"], trust_remote_code),
                data,
                out,
                fleet,
                max_new_tokens or asked["max_new_tokens"],
                term,
            ),
            split=split,
            samples=samples,
            temperature=temperature or 1.0,
        )
    )


def refuse_too_low(temperature: float) -> None:
    """Raise UserError for a temperature at which nothing is sampled."""
    from rollout.types import LEAST_TEMPERATURE

    if 0 < temperature < LEAST_TEMPERATURE:
        raise UserError(f"--temperature {temperature}: the least above 0 is {LEAST_TEMPERATURE}")


def chat(
    model: Model,
    system: Annotated[str | None, Option(help="the system message; the template's own when not given")] = None,
    temperature: Annotated[float, Option(min=0, max=2, help="0 takes the likeliest token each time")] = 0.7,
    max_new_tokens: Annotated[int, Option(min=1, help="longest answer")] = 256,
    seed: int = 0,
    dtype: Dtype = "float32",
    max_length: MaxLength = 2048,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """talk with a model in the terminal"""
    from align.tools.chat import chat_in_terminal
    from rollout import EngineOptions, SamplingOptions

    refuse_too_low(temperature)
    sampling = SamplingOptions(temperature=temperature, max_new_tokens=max_new_tokens)
    engine = EngineOptions(max_length=max_length, batch_sequences=1)
    chat_in_terminal(model_of(model, dtype, trust_remote_code), engine, sampling, system=system, seed=seed)


def merge(
    adapter: Annotated[Path, Argument(help="directory of an adapter as PEFT writes it: RUN/final/adapter")],
    out: Annotated[Path, Argument(help="directory to write to")],
    base: Annotated[str | None, Option(help="the base, where it is not what the adapter names")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        Option(help="of the checkpoint; the base's when not given. bfloat16 rounds most of a young adapter away"),
    ] = None,
) -> None:
    """write a LoRA adapter and its base as one Hugging Face checkpoint"""
    from align.tools.merge import merge_adapter

    print(f"{adapter} on {merge_adapter(adapter, out, base, dtype)}, merged, is in {out}")


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


def model_of(path: str, dtype: Literal["float32", "bfloat16"], trust_remote_code: bool) -> "ModelOptions":
    """The model that a command names. Raises UserError for a directory that lacks something, and where no engine is installed to load it."""
    check_installed(ENGINES)
    from align.recipe import ModelOptions, check_model_directory

    model = ModelOptions(path=path, dtype=dtype, trust_remote_code=trust_remote_code)
    if Path(path).is_dir():
        check_model_directory(Path(path), model)
    return model
