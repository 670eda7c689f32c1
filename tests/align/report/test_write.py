"""The page and the Markdown file as text: nothing in a run can become markup, a script or a request."""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from align.cli import main
from align.errors import UserError
from align.report import write_report
from align.report.content import build_report, flatten
from align.report.curves import panels
from align.report.read import read_run
from align.report.samples import to_json
from align.report.write import for_markdown

EVIL = "</script><script>document.title='taken'</script><img src=x onerror=alert(1)> ![x](http://evil.invalid/a.png)"

WriteRun = Callable[..., Path]
SampleRow = Callable[..., dict[str, Any]]


class Elements(HTMLParser):
    """The elements of a page, and what scripts and styles hold."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.contents: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem:
            self.contents.append((self.cdata_elem, data))


@pytest.fixture
def hostile(write_run: WriteRun, sample_row: SampleRow) -> Path:
    """A run whose every text is an attack."""
    row = sample_row("2", 1.0) | {"prompt": EVIL, "completion": EVIL, "detail": EVIL, "id": EVIL, "ground_truth": EVIL}
    row |= {"verdict": EVIL, "finish_reason": EVIL, "components": {"</script><b>": 1.0}}
    record = {"name": "after", "step": 1, "problems": 4, "accuracy": 0.5, EVIL: 1.0, "verdicts": {EVIL: 4}}
    root = write_run(
        metrics=[{"step": 1, "loss": 1.0, EVIL: 2.0, f"reward/{EVIL}": 1.0}],
        events=[{"time": 1.0, "kind": EVIL, "message": EVIL, "more": EVIL}, {"time": 1e300, "kind": "warning"}],
        evaluations=[(record, [row])],
        samples={1: [row]},
        recipe={"name": EVIL, EVIL: EVIL},
    )
    # JSON can smuggle in half a character.
    with (root / "evaluations.jsonl").open("a") as file:
        file.write('{"name": "\\ud800", "accuracy": NaN, "problems": true, "step": "x"}\n')
    return root


def test_no_text_of_a_run_becomes_an_element(hostile: Path) -> None:
    page = write_report(hostile).read_text(encoding="utf-8")
    elements = Elements(page)
    assert not {"img", "b2", "iframe", "object", "link"} & {tag for tag, _ in elements.found}
    scripts = [attributes.get("type") for tag, attributes in elements.found if tag == "script"]
    assert scripts == ["application/json", None]
    assert not any(name.startswith("on") or name == "style" for _, attributes in elements.found for name in attributes)


def test_the_policy_lets_only_the_pages_own_script_and_style_in(hostile: Path) -> None:
    elements = Elements(write_report(hostile).read_text(encoding="utf-8"))
    (policy,) = [a["content"] for tag, a in elements.found if a.get("http-equiv") == "Content-Security-Policy"]
    style, _, script = (content for _, content in elements.contents)
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    assert policy == (
        f"default-src 'none'; style-src 'sha256-{digests[0]}'; script-src 'sha256-{digests[1]}'; "
        "base-uri 'none'; form-action 'none'"
    )
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|fetch\(|import\(", script)
    assert not re.search(r"url\(|@import", style)


def test_the_data_come_back_as_they_were() -> None:
    data = {"text": EVIL + "\u2028\u2029<!--", "value": [1.5, None]}
    embedded = to_json(data)
    assert not set("<>&'") & set(embedded)
    assert json.loads(embedded) == data


def test_markdown_holds_no_link_no_image_and_no_markup(hostile: Path) -> None:
    write_report(hostile)
    text = (hostile / "report.md").read_text(encoding="utf-8")
    assert not re.search(r"(?<!\\)[<\[\]]", text)
    assert for_markdown("a|b\n\n`c` *d* _e_ f_g <i>") == r"a\|b \`c\` \*d\* \_e\_ f_g \<i\>"
    rows = [line for line in text.splitlines() if line.startswith("| grpo")]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows if "finished" not in row}) <= 3


def test_markdown_tells_of_stages_evaluations_last_metrics_and_warnings(write_run: WriteRun) -> None:
    root = write_run(
        metrics=[{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}],
        events=[{"time": 0.0, "kind": "warning", "message": "an expert had no gradient"}],
        evaluations=[({"name": "after GRPO", "step": 2, "problems": 4, "accuracy": 0.75, "verdicts": {"pass": 3}}, [])],
        recipe={"grpo": {"steps": 2}},
    )
    write_report(root)
    text = (root / "report.md").read_text(encoding="utf-8")
    assert "| grpo | finished | 2026-01-02 03:04:05 UTC | 0:01:00 | 2 of 2 |" in text
    assert "| grpo | after GRPO | 2 | 4 | 75.0% | 3 pass |" in text
    assert "| loss | loss | 1.5 |" in text
    assert "| grpo | 1970-01-01 00:00:00 UTC | warning | an expert had no gradient |" in text


def test_a_stage_that_failed_and_one_that_still_runs_say_so(write_run: WriteRun) -> None:
    root = write_run(metrics=[{"step": 1, "time": 0.0, "loss": 1.0}])
    status = json.loads((root / "status.json").read_text())
    for change, told in (
        ({"state": "failed", "error": "AgreementError: <too far>"}, "failed: AgreementError: &lt;too far&gt;"),
        ({"state": "running", "ended": None}, "running, or killed (last metrics: 1970-01-01 00:00:00 UTC)"),
    ):
        (root / "status.json").write_text(json.dumps(status | change))
        assert told in write_report(root).read_text(encoding="utf-8")
    assert "<b>1</b><span>steps; running, started 2026-01-02 03:04:05 UTC</span>" in (root / "report.html").read_text()


def test_a_run_that_has_nothing_yet_has_a_report(tmp_path: Path, write_run: WriteRun) -> None:
    text = write_report(write_run(tokenizer=False)).read_text(encoding="utf-8")
    for said in ("no evaluations", "no metrics yet", "holds no samples", "Nothing was noted"):
        assert said in text
    assert "Expert load" not in text + (tmp_path / "run" / "report.md").read_text()


def test_what_is_not_known_is_a_dash(write_run: WriteRun) -> None:
    root = write_run(evaluations=[({"name": "before", "step": 0, "accuracy": 0.5}, [])])
    status = json.loads((root / "status.json").read_text())
    (root / "status.json").write_text(json.dumps(status | {"state": "running", "ended": None}))
    assert ">None<" not in write_report(root).read_text(encoding="utf-8")


def test_the_page_says_how_many_samples_it_leaves_out(write_run: WriteRun, sample_row: SampleRow) -> None:
    samples = dict.fromkeys(range(1, 6), [sample_row("2", 1.0)] * 500)
    page = write_report(write_run(samples=samples))
    text = page.read_text(encoding="utf-8")
    assert "Shown are 2,000 of the 2,500 training samples of 5 of 5 steps." in text
    assert "Tokens are not coloured" not in text
    assert page.stat().st_size < 10_000_000


def test_where_the_report_goes(tmp_path: Path, write_run: WriteRun) -> None:
    root = write_run(metrics=[{"step": 1, "reward": 1.0}])
    assert write_report(root) == root / "report.html"
    assert write_report(root, tmp_path) == tmp_path / "report.html"
    assert write_report(root, tmp_path / "new" / "mine.html") == tmp_path / "new" / "mine.html"
    assert (tmp_path / "new" / "mine.md").is_file()
    assert main(["report", str(root), "--svg", str(tmp_path / "plot.svg")]) == 0
    assert (tmp_path / "plot.svg").read_text().startswith("<svg ")
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(UserError, match=r"would replace .*README\.md, which no report has written"):
        write_report(root, tmp_path / "README.html")
    (root / "report.html").unlink()
    assert write_report(root) == root / "report.html"
    (root / "notes.md").write_text("mine")
    with pytest.raises(UserError, match=r"would replace .*notes\.md"):
        write_report(root, root / "notes.html")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "report.md").write_text("mine")
    with pytest.raises(UserError, match=r"would replace .*report\.md, which no report has written"):
        write_report(root, tmp_path / "other")
    with pytest.raises(UserError, match=r"neither a directory nor a file NAME\.html"):
        write_report(root, tmp_path / "report.txt")
    with pytest.raises(UserError, match="cannot write"):
        write_report(root, root / "recipe.yaml" / "report.html")


def test_first_and_last_step_of_every_layer_stand_side_by_side(write_run: WriteRun) -> None:
    def loads(step: int) -> dict[str, float]:
        layer = {"cv": 0.1 * step, "max_over_mean": 1 + 0.1 * step, "dead": 0.25 * (step == 3)}
        return {f"experts/layer_{n}/{name}": value for n in (2, 10) for name, value in layer.items()}

    metrics = [{"step": step, "experts/cv": 0.1 * step} | loads(step) for step in (1, 2, 3)]
    run = write_run(metrics=[*metrics, {"step": 3, "evaluation/accuracy": 0.5}])
    titles = {panel.title: [series.name for series in panel.series] for panel in panels(read_run(run).whole)}
    assert titles["expert load"] == ["cv"]
    assert titles["experts/cv"] == ["layer_2", "layer_10"]
    page = write_report(run).read_text()
    assert "<h2>Expert load</h2>" in page
    assert (
        "| 2 | 0.1 | 0.3 | 1.1 | 1.3 | 0.0% | 25.0% |\n| 10 | 0.1 | 0.3 | 1.1 | 1.3 | 0.0% | 25.0% |"
        in (run / "report.md").read_text()
    )


def test_settings_stand_side_by_side_and_differences_are_marked(write_run: WriteRun) -> None:
    root = write_run(recipe={"grpo": {"steps": 2, "layers": [1, 2]}, "seed": 1})
    write_run(root / "sft", stage="sft")
    table = build_report(read_run(root)).sections[-1].tables[0]
    rows = {str(key): ([str(value) for value in values], "differs" in key.kind) for key, *values in table.rows}
    assert table.heads == ["key", "sft", "grpo"]
    assert rows["seed"] == (["0", "1"], True)
    assert rows["grpo.steps"] == (["", "2"], False)
    assert rows["grpo.layers"] == (["", "1, 2"], False)
    assert rows["environment.packages.torch"] == (["2", "2"], False)
    assert list(flatten({"a": [{"b": None}, True], "c": []})) == [("a.0.b", "none"), ("a.1", "yes"), ("c", "none")]


def test_too_many_events_are_counted_and_alarms_kept(write_run: WriteRun) -> None:
    events = [{"time": i, "kind": "note", "message": f"note {i}"} for i in range(300)]
    root = write_run(events=[*events, {"time": 999.0, "kind": "error", "message": "last", "step": 7}])
    found = next(section for section in build_report(read_run(root)).sections if section.key == "events")
    assert found.note == "101 more in events.jsonl."
    assert len(found.tables[0].rows) == 200
    assert found.tables[0].rows[-1][-1] == "last (step: 7)"
