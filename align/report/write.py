"""A run directory to its report: one HTML page and one Markdown file; and to one plot of its steps as an SVG file."""

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from align.errors import UserError
from align.report.content import build_report
from align.report.parts import Report
from align.report.plot import build_plot
from align.report.read import read_run
from align.report.samples import JSON_STYLE
from align.run import write_atomically

NAME = "report.html"
STYLES = ("page.css",)
SCRIPTS = ("page.js", "charts.js", "samples.js")
# An underscore inside a word is no markup, and reads better bare.
MARKDOWN_PUNCTUATION = re.compile(r"([\\`*\[\]<>|~$&#]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")
# Control characters, which XML refuses, and lone surrogates, which JSON can smuggle in and UTF-8 does not have.
NO_CHARACTERS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


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
    text = page.with_suffix(".md")
    if text.exists() and not page.exists() and page != record.path / NAME:
        raise UserError(f"--out {out} would replace {text}, which no report has written: take another name")
    report = build_report(record)
    _write(page, render_page(report)[0], "--out")
    _write(text, _render("report.md", report=report), "--out")
    return page


def render_page(report: Report) -> tuple[str, str]:
    """The report as one HTML page that needs nothing else, and the Content-Security-Policy that it has."""
    style, script = (_assets(names) for names in (STYLES, (*SCRIPTS, "live.js" if report.live else "start.js")))
    sources = {"default": "none", "style": f"sha256-{_digest(style)}", "script": f"sha256-{_digest(script)}"}
    sources |= {"connect": "self"} if report.live else {}
    policy = (
        "".join(f"{kind}-src '{source}'; " for kind, source in sources.items()) + "base-uri 'none'; form-action 'none'"
    )
    return cleaned(_render("report.html", report=report, style=style, script=script, policy=policy)), policy


def cleaned(text: str) -> str:
    """`text` with a replacement for each character that a page cannot hold."""
    return NO_CHARACTERS.sub("\ufffd", text)


def write_plot(run: Path, out: Path) -> Path:
    """Write one plot of the run directory `run` to the SVG file `out`, and return its path.

    Rewards, accuracy and the agreement of sampler and learner over the steps, with the evaluations marked. Raises
    UserError for what is no run, for a run without metrics, and where the file cannot be written.
    """
    path = out.expanduser().absolute()
    if path.suffix != ".svg":
        raise UserError(f"--svg {out} is no file NAME.svg; write it like --svg plot.svg")
    _write(path, _render("plot.svg", plot=build_plot(read_run(run))), "--svg")
    return path


def for_markdown(value: object) -> Markup:
    """`value` as plain text in one cell of a Markdown table: no markup, no link, no image, no line break."""
    return Markup(MARKDOWN_PUNCTUATION.sub(r"\\\1", " ".join(str(value).split())))


def _render(template: str, **values: Any) -> str:
    """A template with every value escaped for where it goes; None becomes a dash."""
    markdown = template.endswith(".md")

    def finalize(value: Any) -> Any:
        shown = "–" if value is None else value
        return for_markdown(shown) if markdown and not isinstance(shown, Markup) else shown

    environment = Environment(
        loader=PackageLoader("align.report"),
        autoescape=True,
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = JSON_STYLE
    return environment.get_template(template).render(values)


def _assets(names: tuple[str, ...]) -> Markup:
    directory = Path(__file__).parent / "templates"
    return Markup("\n".join((directory / name).read_text(encoding="utf-8") for name in names))


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _write(path: Path, text: str, option: str) -> None:
    try:
        write_atomically(path, cleaned(text))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}. Choose another with {option}") from error
