"""A reward model behind a real HTTP server on loopback: what is sent, and what becomes of a server that fails."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from reward import Mixture, RewardError, RewardTerm, Sample, Verdict
from reward.learned import endpoint
from reward.learned.endpoint import reward_endpoint
from reward.learned.model import reward_model

COMPLETIONS = ["4", "It is four.", "I am sorry, but I can't help with that."]


class Server:
    """Answers as vLLM's `/classify` does; `faults` are what the next requests get instead."""

    def __init__(self, model: Any) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.faults: list[Any] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(body)
                outer.headers.append(dict(self.headers))
                fault = outer.faults.pop(0) if outer.faults else None
                if callable(fault):
                    fault(self)
                    return
                if self.path != "/classify" or fault is not None:
                    self.answer(*(fault or (404, "no such page")))
                    return
                with torch.no_grad():
                    numbers = [float(model(input_ids=torch.tensor([ids])).logits) for ids in body["input"]]
                data = [
                    {"index": i, "label": "LABEL_0", "probs": [number], "num_classes": 1}
                    for i, number in reversed(list(enumerate(numbers)))
                ]
                self.answer(200, {"object": "list", "model": body["model"], "data": data})

            def answer(self, status: int, content: Any, **headers: str) -> None:
                text = (content if isinstance(content, str) else json.dumps(content)).encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()


@pytest.fixture
def server(model: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(endpoint, "FIRST_PAUSE_S", 0.01)
    running = Server(model)
    yield running
    running.close()


def samples(*completions: str) -> list[Sample]:
    return [Sample(id=c, prompt="What is 2 + 2?", completion=c, ground_truth=None) for c in completions or COMPLETIONS]


def params(server: Server, checkpoint: Path, **more: Any) -> dict[str, Any]:
    return {"url": server.url, "model": "helpful", "path": str(checkpoint), "timeout_s": 5.0, **more}


def test_the_scores_are_those_of_the_same_model_in_this_process(server: Server, checkpoint: Path) -> None:
    here = reward_model(samples(), path=str(checkpoint))
    there = reward_endpoint(samples(), **params(server, checkpoint, batch_size=2))
    assert [score.value for score in there] == pytest.approx([score.value for score in here], abs=1e-5)
    assert [score.verdict for score in there] == [score.verdict for score in here]
    assert [len(request["input"]) for request in server.requests] == [2, 1]
    first = server.requests[0]
    assert (first["model"], first["use_activation"]) == ("helpful", False)
    assert all(ids.count(0) == 1 and ids[0] == 0 and ids[-1] == 1 for ids in first["input"])


@pytest.mark.parametrize(
    "fault",
    [
        (503, "starting"),
        (429, "busy"),
        (200, "half an answ"),
        lambda handler: handler.connection.shutdown(socket.SHUT_RDWR),
        lambda handler: time.sleep(1.0),
    ],
    ids=["503", "429", "no JSON", "closed", "too slow"],
)
def test_a_passing_fault_costs_another_attempt(server: Server, checkpoint: Path, fault: Any) -> None:
    server.faults = [fault]
    scores = reward_endpoint(samples("4"), **params(server, checkpoint, timeout_s=0.5))
    assert scores[0].verdict is not Verdict.INFRA_ERROR
    assert len(server.requests) == 2


def test_a_server_that_stays_broken_masks_the_samples_of_its_batch_and_no_others(
    server: Server, checkpoint: Path
) -> None:
    server.faults = [(500, "out of memory")] * 3
    first, *rest = reward_endpoint(samples(), **params(server, checkpoint, attempts=3, batch_size=1))
    assert first.verdict is Verdict.INFRA_ERROR
    assert first.detail == f"{server.url}: HTTP 500 Internal Server Error: out of memory (3 attempts)"
    assert all(score.verdict is not Verdict.INFRA_ERROR for score in rest)
    assert len(server.requests) == 5


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ((404, "the model `helpful` does not exist"), "HTTP 404 Not Found: the model `helpful` does not exist"),
        ((401, "who are you?"), "HTTP 401 Unauthorized"),
        ((200, {"data": [{"index": 0, "probs": [0.2, 0.8]}]}), "the model has 2 classes, where a reward model has one"),
        ((200, {"data": []}), "is no answer to 1 conversations"),
        ((200, ["?"]), "is no answer to 1 conversations"),
    ],
)
def test_an_answer_that_will_not_change_is_not_asked_for_again(
    server: Server, checkpoint: Path, fault: Any, message: str
) -> None:
    server.faults = [fault]
    (score,) = reward_endpoint(samples("4"), **params(server, checkpoint))
    assert score.verdict is Verdict.INFRA_ERROR
    assert message in score.detail
    assert len(server.requests) == 1


def test_a_redirection_is_not_followed_since_it_would_take_the_key_along(
    server: Server, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REWARD_KEY", "s3cret")
    server.faults = [lambda handler: handler.answer(302, "", Location=f"{server.url}/classify")]
    (score,) = reward_endpoint(samples("4"), **params(server, checkpoint, api_key_env="REWARD_KEY"))
    assert "HTTP 302" in score.detail
    assert len(server.requests) == 1


def test_the_key_comes_from_the_environment_and_shows_nowhere(
    server: Server, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RewardError, match="the environment variable REWARD_KEY, which api_key_env names, is not set"):
        reward_endpoint([], **params(server, checkpoint, api_key_env="REWARD_KEY"))
    monkeypatch.setenv("REWARD_KEY", "s3cret")
    server.faults = [(403, "the key s3cret is not known")]
    (score,) = reward_endpoint(samples("4"), **params(server, checkpoint, api_key_env="REWARD_KEY"))
    assert server.headers[0]["Authorization"] == "Bearer s3cret"
    assert "the key *** is not known" in score.detail


def test_a_server_that_is_down_or_has_no_such_model_ends_the_run_before_it_begins(
    server: Server, checkpoint: Path
) -> None:
    def mixture(**more: Any) -> Mixture:
        return Mixture([RewardTerm(name="reward_endpoint", params=params(server, checkpoint, attempts=2, **more))])

    mixture().make_ready()
    with socket.create_server(("127.0.0.1", 0)) as free:
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    for before in (Mixture.make_ready, Mixture.check_ready):
        with pytest.raises(RewardError, match=rf"{nobody} cannot be used: .*refused.*\(2 attempts\)"):
            before(mixture(url=nobody))
    mixture(url=nobody, path="/still/to/be/made").check_ready()
    server.faults = [(404, "no such model")]
    with pytest.raises(RewardError, match=rf"{server.url} cannot be used: HTTP 404"):
        mixture().make_ready()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"url": "file:///etc/passwd"}, "url must begin with http:// or https://"),
        ({"attempts": 0}, "attempts must be 1 or more"),
        ({"path": "/nowhere"}, "/nowhere has no tokenizer"),
    ],
)
def test_parameters_that_cannot_be_meant(server: Server, checkpoint: Path, more: Any, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        reward_endpoint([], **params(server, checkpoint, **more))
