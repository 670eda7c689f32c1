"""A run directory to its report: one HTML page and one Markdown file."""

from pathlib import Path

from align.errors import UserError
from align.report.evaluations import evaluation_table
from align.report.markdown import markdown_page
from align.report.page import html_page
from align.report.published import published_figures
from align.report.read import read_run
from align.run import write_atomically

NAME = "report.html"


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the report on the run directory `run`, and return where the page is.

    The page goes to `out` (a file NAME.html, or a directory that is there), else to report.html in the run; the
    Markdown file beside it, with the ending .md. Raises UserError for what is no run, for a damaged file in it, and
    where the report cannot be written.
    """
    record = read_run(run)
    page = (record.path if out is None else out.expanduser().absolute()) / (NAME if out is None or out.is_dir() else "")
    if page.suffix != ".html":
        raise UserError(f"--out {out} is neither a directory nor a file NAME.html; write it like --out report.html")
    table, published = evaluation_table(record), published_figures(record)
    texts = {
        page: html_page(record, table, published),
        page.with_suffix(".md"): markdown_page(record, table, published),
    }
    for path, text in texts.items():
        try:
            # A lone surrogate, which JSON can smuggle in, is no character of UTF-8.
            write_atomically(path, text.encode(errors="replace"))
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}. Choose another with --out") from error
    return page
