"""Commands that list what there is: data, rewards, evaluation hooks, and what the machine allows of the sandbox."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from align.cli.arguments import EXIT_FAILED

if TYPE_CHECKING:
    from reward.registry import Entry


def check_sandbox() -> int:
    """say what this machine allows of it: the exit status is 0 where code can be isolated, 1 where it cannot"""
    from reward.isolation import check as check_machine

    pieces = check_machine()
    for piece in pieces:
        state = "yes" if piece.ok else "MISSING" if piece.needed else "no"
        print(f"{state:8}{piece.name}{': ' + piece.detail if piece.detail else ''}")
    return 0 if all(piece.ok for piece in pieces if piece.needed) else EXIT_FAILED


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


def list_data() -> None:
    """the data cards that come with the project"""
    from rich.console import Console

    from align.tools.show_data import show_cards

    show_cards(Console())


def list_rewards() -> None:
    """each with its parameters and what it is for"""
    from reward import available

    show(available())


def list_evaluations() -> None:
    """each with its parameters and what it measures"""
    from align.evaluate.hooks import available

    show(available())


def show(entries: "Sequence[Entry]") -> None:
    """Print registered functions with their parameters and descriptions."""
    for item in entries:
        parameters = ", ".join(p.name if p.required else f"{p.name}={p.default!r}" for p in item.parameters)
        print(f"{item.name}({parameters})\n    {item.description}")
