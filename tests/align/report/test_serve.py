"""The live report: who gets it, what it holds, and that it follows the run."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from align.cli import main
from align.report import serve
from align.report.serve import LiveReport, Server
from align.run import RunDirectory, write_samples

EVIL = "</script><script>document.title='taken'</script><img src=x onerror=alert(1)>"

WriteRun = Callable[..., Path]
SampleRow = Callable[..., dict[str, Any]]


class Client:
    """Asks a server that runs in this process."""

    def __init__(self, server: Server) -> None:
        self.server = server

    def get(self, name: str = "", *, secret: str | None = None, **headers: str) -> tuple[int, dict[str, str], str]:
        """Status, headers and text of the answer for what is below the page's address."""
        connection = HTTPConnection("127.0.0.1", self.server.server_port, timeout=30)
        headers = {key.replace("_", "-"): value for key, value in headers.items()}
        connection.request("GET", f"/{self.server.secret if secret is None else secret}/{name}", headers=headers)
        answer = connection.getresponse()
        found = answer.status, dict(answer.headers), answer.read().decode()
        connection.close()
        return found

    def samples(self, **query: Any) -> dict[str, Any]:
        """Samples that the page asks for."""
        status, _, text = self.get(f"samples?{urlencode(query)}")
        assert status == 200, text
        found: dict[str, Any] = json.loads(text)
        return found


@pytest.fixture
def served() -> Iterator[Callable[[Path], Client]]:
    """Serves the live report on a run until the end of the test."""
    servers = []

    def start(run: Path) -> Client:
        server = Server(LiveReport(run), 0)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
        return Client(server)

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_only_who_has_the_address_gets_the_page(served: Any, write_run: WriteRun) -> None:
    client = served(write_run())
    assert client.server.server_address[0] == "127.0.0.1"
    assert client.server.address == f"http://127.0.0.1:{client.server.server_port}/{client.server.secret}/"
    assert len(client.server.secret) >= 20
    assert client.get()[0] == 200
    for secret in ("", "x" * 22, client.server.secret[:-1]):
        assert client.get(secret=secret)[0] == 404
    assert client.get("../recipe.yaml")[0] == client.get("recipe.yaml")[0] == 404


def test_a_name_of_another_site_is_refused(served: Any, write_run: WriteRun) -> None:
    client = served(write_run())
    port = client.server.server_port
    for name, status in (
        ("evil.invalid", 403),
        (f"evil.invalid:{port}", 403),
        (f"localhost:{port}", 200),
        ("127.0.0.1", 200),
    ):
        assert client.get(Host=name)[0] == status


def test_its_policy_lets_it_ask_its_own_server_and_nobody_else(served: Any, write_run: WriteRun) -> None:
    _, headers, text = served(write_run()).get()
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "connect-src 'self'; " in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store"
    assert 'http-equiv="Content-Security-Policy"' in text
    assert "Access-Control-Allow-Origin" not in headers


def test_no_text_of_a_run_becomes_markup(served: Any, write_run: WriteRun, sample_row: SampleRow) -> None:
    row = sample_row("2", 1.0) | {"completion": EVIL, "prompt": EVIL, "id": "\ud800"}
    row |= {"metadata": json.dumps({"messages": [{"role": EVIL, "content": EVIL}]})}
    row["id"] = EVIL
    client = served(write_run(samples={1: [row]}, events=[{"time": 1.0, "kind": "warning", "message": EVIL}]))
    text = client.get()[2]
    assert "<img" not in text
    assert text.count("<script") == 2
    status, headers, text = client.get("samples?stage=grpo&step=1")
    assert (status, headers["Content-Type"]) == (200, "application/json; charset=utf-8")
    assert not set("<>&") & set(text)
    assert json.loads(text)["prompts"] == [[{"role": EVIL, "content": EVIL}]]


def test_the_page_is_another_one_when_the_run_has_written_something(
    served: Any, write_run: WriteRun, sample_row: SampleRow
) -> None:
    root = write_run(metrics=[{"step": 1, "loss": 2.0}])
    client = served(root)
    tag = client.get()[1]["ETag"]
    assert client.get(If_None_Match=tag)[0] == 304

    def changed(needle: str) -> None:
        nonlocal tag
        status, headers, text = client.get(If_None_Match=tag)
        assert status == 200
        assert needle in text
        tag = headers["ETag"]
        assert client.get(If_None_Match=tag)[0] == 304

    with (root / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "loss": 0.123}\n')
    changed('"values":[2.0,0.123]')
    with (root / "events.jsonl").open("a") as file:
        file.write('{"time": 5.0, "kind": "warning", "message": "entropy fell"}\n')
    changed("entropy fell")
    write_samples(RunDirectory(root).samples_file(2), [sample_row("2", 1.0)])
    changed('"samples":{"sources":[{"stage":"grpo","step":2,"evaluation":null}]}')
    (root / "status.json").write_text((root / "status.json").read_text().replace("finished", "running"))
    changed("Following the run.")
    write_run(root / "inner", stage="sft")
    changed("inner")


def test_samples_are_loaded_by_step_or_evaluation_and_in_parts(
    served: Any, write_run: WriteRun, sample_row: SampleRow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve.samples, "SAMPLES_OF_A_PART", 2)
    steps = {step: [sample_row(f"{step}", i / 10, id=f"{step}/{i}") for i in range(5)] for step in (1, 2)}
    record = {"name": "after GRPO", "step": 2, "problems": 1}
    client = served(write_run(samples=steps, evaluations=[(record, [sample_row("9", 1.0, greedy=True)])]))
    assert "3/" not in client.get()[2].partition('id="data"')[2]
    found: list[str] = []
    while len(found) < 5:
        part = client.samples(stage="grpo", step=2, start=len(found))
        assert part["sources"] == [
            {"stage": "grpo", "step": 2, "evaluation": None, "total": 5, "shown": len(part["rows"])}
        ]
        assert part["start"] == len(found)
        found += [row["id"] for row in part["rows"]]
    assert found[0] == "2/4"
    assert sorted(found) == [f"2/{i}" for i in range(5)]
    assert client.samples(stage="grpo", step=2, start=5)["rows"] == []
    (answer,) = client.samples(stage="grpo", step=2, evaluation="after GRPO")["rows"]
    assert answer["completion"] == "9"
    for query, status in (
        ("stage=grpo&step=3", 404),
        ("stage=sft&step=1", 404),
        ("stage=grpo", 404),
        ("stage=grpo&step=x", 400),
    ):
        assert client.get(f"samples?{query}")[0] == status


def test_a_part_of_long_samples_has_a_bounded_size(served: Any, write_run: WriteRun, sample_row: SampleRow) -> None:
    rows = [sample_row("2", 0.5) | {"completion": f"{i}" + "x" * 19_000} for i in range(300)]
    client = served(write_run(samples={1: rows}))
    status, headers, _ = client.get("samples?stage=grpo&step=1")
    assert status == 200
    assert 1_000_000 < int(headers["Content-Length"]) <= 2_100_000
    # A browser takes it packed.
    connection = HTTPConnection("127.0.0.1", client.server.server_port)
    connection.request("GET", f"/{client.server.secret}/", headers={"Accept-Encoding": "gzip"})
    assert connection.getresponse().headers["Content-Encoding"] == "gzip"
    connection.close()


def test_damage_is_told_to_the_page_and_does_not_end_the_server(served: Any, write_run: WriteRun) -> None:
    root = write_run(metrics=[{"step": 1, "loss": 2.0}])
    client = served(root)
    (root / "metrics.jsonl").write_text("{\n{}\n")
    status, _, text = client.get()
    assert status == 503
    assert "metrics.jsonl, line 1: not JSON" in text
    (root / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
    assert client.get()[0] == 200


def test_ctrl_c_ends_it(
    write_run: WriteRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(server: Server) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "serve_forever", interrupted)
    assert main(["report", str(write_run()), "--serve"]) == 0
    assert re.fullmatch(
        r"the report is at http://127\.0\.0\.1:\d+/\S+/ and .*\n.* no longer served.*\n", capsys.readouterr().out
    )


def test_what_cannot_be_served_is_one_sentence(
    served: Any, write_run: WriteRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_run()
    port = served(root).server.server_port
    for options, told in (
        ([str(root), "--serve", "--port", str(port)], f"--port {port} cannot be used (Address already in use)"),
        ([str(root), "--port", "8000"], "--port has no effect without --serve"),
        ([str(root), "--serve", "--out", "a.html"], "--serve writes no files"),
        ([str(tmp_path / "none"), "--serve"], "does not exist"),
    ):
        assert main(["report", *options]) == 2
        assert told in capsys.readouterr().err
    assert not (root / "report.html").exists()
