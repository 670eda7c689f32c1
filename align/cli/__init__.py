"""The `align` command. What a command needs is imported when it runs, so that `align --help` answers at once."""

import errno
import sys
from collections.abc import Callable, Sequence
from typing import Any

import typer

from align.cli import init, listings, models, recipes, runs, scores
from align.cli.arguments import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_TERMINATED, EXIT_USER_ERROR
from align.cli.lasting import lasting_streams
from align.errors import ENGINES, Terminated, UserError, not_installed

OUR_PACKAGES = ("align", "rollout", "reward")
FULL = (errno.ENOSPC, errno.EDQUOT)
UNUSABLE_PLACES = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, *FULL)
"""What is wrong with a file or directory of the user's that cannot be read or written."""
Commands = dict[str, Callable[..., int | None]]
COMMANDS: Commands = {
    "check": recipes.check,
    "keys": recipes.keys,
    "resume": recipes.resume,
    "plan": recipes.plan,
    "pipeline": recipes.pipeline,
    "merge": models.merge,
    "doctor": models.doctor,
    "eval": models.evaluate,
    "chat": models.chat,
    "convert": models.convert,
    "score": scores.score,
    "report": runs.report,
    "habits": runs.habits,
    "publish": runs.publish,
}
GROUPS: dict[str, tuple[str, Commands]] = {
    "sandbox": ("the sandbox that runs a model's code", {"check": listings.check_sandbox}),
    "rewards": ("the rewards that a recipe can name", {"list": listings.list_rewards, "probe": scores.probe}),
    "init": (
        "write a recipe for one's own data and model, and say what is in them",
        {
            "sft": init.init_sft,
            "grpo": init.init_grpo,
            "dpo": init.init_dpo,
            "reward-model": init.init_reward_model,
        },
    ),
    "data": (
        "the data that a recipe can name, and one's own",
        {"show": listings.show_data, "list": listings.list_data},
    ),
    "evaluations": ("the evaluation hooks that a recipe can name", {"list": listings.list_evaluations}),
}


def application() -> typer.Typer:
    """The command line: the stages, `COMMANDS` and `GROUPS`."""
    app = plain("The alignment stages of DeepSeek-V2: SFT, then GRPO, on Ray, vLLM and DeepSpeed.")
    for stage, text in recipes.STAGES.items():
        app.command(stage, help=text, cls=recipes.StageCommand)(recipes.stage_command(stage.replace("-", "_")))
    for name, command in COMMANDS.items():
        app.command(name)(command)
    for name, (text, commands) in GROUPS.items():
        app.add_typer(group := plain(text), name=name)
        for inner, command in commands.items():
            group.command(inner)(command)
    return app


def plain(text: str) -> typer.Typer:
    """A command line, or a part of one, whose help begins with `text`."""
    settings: dict[Any, Any] = {"help_option_names": ["-h", "--help"], "terminal_width": 110}
    return typer.Typer(help=text, add_completion=False, rich_markup_mode=None, context_settings=settings)


@lasting_streams()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    command = typer.main.get_command(application())
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
    except OSError as error:
        # What cannot be written whole has no name.
        place = error.filename or ("a file could not be written" if error.errno in FULL else None)
        if error.errno not in UNUSABLE_PLACES or not place:
            raise
        say(f"error: {place}: {error.strerror}")
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
