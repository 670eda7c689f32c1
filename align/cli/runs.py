"""Commands on what a run has left: a page about it, and its model on the hub."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from align.cli.arguments import RunPath
from align.errors import UserError


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


def habits(
    before: Annotated[Path, Argument(metavar="RUN|A", help="run directory, or answers: a file of samples or rows")],
    after: Annotated[Path | None, Argument(metavar="B", help="answers that are compared with those of A")] = None,
    start: Annotated[
        Path | None,
        Option(help="of RUN alone: answers that its steps are compared with, in the place of its own first ones"),
    ] = None,
) -> None:
    """tell what the answers of a run took up or lost against its start, or those of B against those of A

    Of a run directory as A or B, the answers of the last evaluation are taken, or the samples of the last step where it has none. Nothing is told of
    two samples of the same policy, but in one case of a hundred.
    """
    from align.tools.habits import compare_answers, run_habits

    if after is not None and start is not None:
        raise UserError("--start has no effect beside two sets of answers: leave it out")
    for line in run_habits(before, start) if after is None else compare_answers(before, after):
        print(line)


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
