"""Runs to report on, and a real browser to read the page in."""

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from align.run import RunDirectory, write_jsonl, write_samples

NANO = Path(__file__).parents[3] / "recipes" / "nano" / "policy"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
PATIENCE_S = 30.0


def write_run(
    path: Path,
    *,
    stage: str = "grpo",
    metrics: Sequence[Mapping[str, Any]] = (),
    events: Sequence[Mapping[str, Any]] = (),
    evaluations: Sequence[tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]] = (),
    samples: Mapping[int, Sequence[Mapping[str, Any]]] | None = None,
    recipe: Mapping[str, Any] | None = None,
    tokenizer: bool = True,
) -> Path:
    """A finished run in `path`, as a stage leaves it. `evaluations` are (record, completions), `samples` are by step."""
    path.mkdir(parents=True, exist_ok=True)
    status = {"state": "finished", "stage": stage, "started": "2026-01-02T03:04:05+00:00"}
    status |= {"ended": "2026-01-02T03:05:05+00:00", "error": None}
    (path / "status.json").write_text(json.dumps(status))
    plan = {"stage": stage, "name": path.name, "seed": 0, "model": {"path": "nowhere"}, **(recipe or {})}
    run = RunDirectory(path)
    run.save_recipe(yaml.safe_dump(plan))
    run.save_environment({"python": "3.11", "packages": {"torch": "2"}})
    write_jsonl(run.metrics_file, metrics)
    write_jsonl(run.events_file, events)
    write_jsonl(run.evaluations_file, [record for record, _ in evaluations])
    for record, rows in evaluations:
        if rows:
            write_samples(run.evaluations_directory / f"{record['name']}.parquet", rows)
    for step, rows in (samples or {}).items():
        write_samples(run.samples_file(step), rows)
    if tokenizer:
        run.final_directory.mkdir()
        for name in ("tokenizer.json", "config.json"):
            shutil.copy(NANO / name, run.final_directory / name)
    return path


@pytest.fixture(name="write_run")
def _write_run(tmp_path: Path) -> Callable[..., Path]:
    """`write_run`, of a run in the directory of the test: `run`, or another one that is named or given as a whole path."""

    def write(path: Path | str = "run", **contents: Any) -> Path:
        return write_run(tmp_path / path, **contents)

    return write


def sample_row(text: str, reward: float | None, **more: Any) -> dict[str, Any]:
    """A sample of a training step, tokenised by the nano tokenizer, each token less likely than the one before."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(NANO / "tokenizer.json"))
    ids = [*tokenizer.encode(text, add_special_tokens=False).ids, tokenizer.token_to_id("<｜end▁of▁sentence｜>")]
    return {
        "id": "problem/1",
        "index": 0,
        "greedy": False,
        "prompt": "What is 1 + 1?",
        "completion": text,
        "ground_truth": "2",
        "reward": reward,
        "verdict": "infra_error" if reward is None else "pass" if reward > 0.5 else "wrong",
        "components": {"exact_answer": reward},
        "detail": "",
        "finish_reason": "stop",
        "tokens": len(ids),
        "advantage": 0.0 if reward is None else reward - 0.5,
        "trained_on": reward is not None,
        "token_ids": ids,
        "log_probs": [-0.5 * place for place in range(len(ids))],
    } | more


@pytest.fixture(name="sample_row")
def _sample_row() -> Callable[..., dict[str, Any]]:
    return sample_row


class Browser:
    """One page of a headless Chromium, driven over the DevTools protocol. Collects what the page complains of."""

    def __init__(self, connection: Any) -> None:
        self._connection, self._calls = connection, 0
        self.complaints: list[Any] = []
        self.requests: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        """The result of one command of the protocol."""
        self._calls += 1
        self._connection.send(json.dumps({"id": self._calls, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._connection.recv(timeout=PATIENCE_S))
            if message.get("id") == self._calls:
                assert "error" not in message, message
                return message["result"]
            self._note(message)

    def open(self, path: Path | str, *, width: int = 1200, height: int = 900) -> None:
        """Go to a file, or to an address, and wait until the script of the page has run."""
        address = path.as_uri() if isinstance(path, Path) else path
        self.complaints, self.requests = [], []
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Page.navigate", url=address)
        self.wait(f"location.href === {json.dumps(address)} && document.readyState === 'complete'")

    def js(self, expression: str) -> Any:
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until a condition holds in the page."""
        end = time.monotonic() + PATIENCE_S
        while not self.js(condition):
            assert time.monotonic() < end, f"never came true: {condition}"
            time.sleep(0.05)

    def enter(self, id_: str, value: object) -> None:
        """Give a field of a form a value, as a user does."""
        setter = (
            f"field.checked = {json.dumps(value)}" if isinstance(value, bool) else f"field.value = {json.dumps(value)}"
        )
        event = "field.dispatchEvent(new Event('input', {bubbles: true}))"
        self.js(f"{{ const field = document.getElementById({json.dumps(id_)}); {setter}; {event}; }}")

    def point(self, element: str, across: float = 0.5) -> None:
        """Move the mouse onto an element, `across` of the way from its left to its right."""
        self.js(f"({element}).scrollIntoView({{block: 'center'}})")
        # Scrolling is told to the page in its next frame.
        self.js("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")
        box = self.js(f"(({{x, y, width, height}}) => [x, y, width, height])(({element}).getBoundingClientRect())")
        x, y = box[0] + across * box[2], box[1] + box[3] / 2
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def press(self, key: str) -> None:
        """Press a key where the focus is."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key)

    def _note(self, message: Mapping[str, Any]) -> None:
        if message["method"] == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        elif message["method"] in (
            "Runtime.exceptionThrown",
            "Runtime.consoleAPICalled",
            "Log.entryAdded",
            "Page.javascriptDialogOpening",
        ):
            self.complaints.append(message["params"])


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A headless Chromium; the tests that need one are skipped where there is none."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip("no Chromium on PATH: the page is not opened in a browser here")
    client = pytest.importorskip("websockets.sync.client", reason="no websockets to talk to Chromium with")
    with (
        _chromium(program, tmp_path_factory.mktemp("chromium")) as address,
        client.connect(address, proxy=None, max_size=None) as connection,
    ):
        yield Browser(connection)


@contextmanager
def _chromium(program: str, profile: Path) -> Iterator[str]:
    """Start the browser and say where its page listens."""
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--no-first-run"]
    process = subprocess.Popen(
        [program, *options, f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield _page_address(profile)
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


def _page_address(profile: Path) -> str:
    from urllib.request import ProxyHandler, build_opener

    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        try:
            port = (profile / "DevToolsActivePort").read_text().split()[0]
            with build_opener(ProxyHandler({})).open(f"http://127.0.0.1:{port}/json/list") as answer:
                return next(str(page["webSocketDebuggerUrl"]) for page in json.load(answer) if page["type"] == "page")
        except (OSError, IndexError, StopIteration):
            time.sleep(0.1)
    pytest.fail(f"Chromium did not start within {PATIENCE_S:g} s")
