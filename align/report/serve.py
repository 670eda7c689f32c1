"""The report on a run as a live page: a server for the browser of whoever started it, on this machine alone."""

import gzip
import secrets
import sys
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import parse_qs

from align.errors import UserError
from align.report import samples
from align.report.content import build_report
from align.report.read import RunRecord, fingerprint, read_run
from align.report.write import cleaned, render_page

HOST = "127.0.0.1"
# A page of another site whose name was made to point at this machine has that name in its requests.
NAMES = (HOST, "localhost")
HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class LiveReport:
    """What the page shows of the run in `path`, read again when the run has written something."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, Lock()
        self._tag, self._record = fingerprint(path), read_run(path)
        self._page: tuple[str, str] | None = None

    def page(self) -> tuple[str, str, str]:
        """The page, its Content-Security-Policy, and a tag that is another one when the page is. Raises UserError as `read_run` does."""
        with self._lock:
            record = self._newest()
            self._page = self._page or render_page(build_report(record, live=True))
            return *self._page, self._tag

    def tag(self) -> str:
        """The tag that the page has now."""
        return fingerprint(self._path)

    def samples(self, stage: str, step: int | None, evaluation: str | None, start: int) -> str | None:
        """Some samples of a step or an evaluation as JSON; None where the run has no such samples. Raises UserError as `read_run` does."""
        with self._lock:
            record = self._newest()
        for source in samples.sources(record):
            if (source.stage.label, source.evaluation) == (stage, evaluation) and (evaluation or source.step == step):
                return samples.to_json(samples.part_as_data(record, source, start))
        return None

    def _newest(self) -> RunRecord:
        if (tag := self.tag()) != self._tag:
            self._record = read_run(self._path)
            self._tag, self._page = tag, None
        return self._record


class Handler(BaseHTTPRequestHandler):
    """Answers requests for the page, which is below a secret name, and for the samples that it asks for."""

    server: "Server"
    timeout = 60

    def do_GET(self) -> None:
        """Answer with the page, samples, or why not."""
        path, _, query = self.path.partition("?")
        secret, _, name = path.removeprefix("/").partition("/")
        if (self.headers.get("Host") or "").partition(":")[0] not in NAMES:
            return self._refuse(HTTPStatus.FORBIDDEN, "this page is only for a browser on this machine")
        if not secrets.compare_digest(secret.encode(), self.server.secret.encode()):
            return self._refuse(HTTPStatus.NOT_FOUND, "open the address that `align report --serve` printed")
        try:
            if name == "":
                return self._page()
            if name == "samples":
                return self._samples(parse_qs(query))
        except (UserError, OSError) as error:
            return self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, str(error))
        return self._refuse(HTTPStatus.NOT_FOUND, "there is nothing of this name")

    def _page(self) -> None:
        report = self.server.report
        if self.headers.get("If-None-Match") == f'"{report.tag()}"':
            return self._answer(HTTPStatus.NOT_MODIFIED, "", "text/html")
        html, policy, tag = report.page()
        policy += "; frame-ancestors 'none'"
        return self._answer(HTTPStatus.OK, html, "text/html", {"ETag": f'"{tag}"', "Content-Security-Policy": policy})

    def _samples(self, query: dict[str, list[str]]) -> None:
        given = {key: values[0] for key, values in query.items()}
        try:
            step = int(given["step"]) if "step" in given else None
            start = max(0, int(given.get("start", "0")))
        except ValueError:
            return self._refuse(HTTPStatus.BAD_REQUEST, "step and start are whole numbers")
        found = self.server.report.samples(given.get("stage", ""), step, given.get("evaluation"), start)
        if found is None:
            return self._refuse(HTTPStatus.NOT_FOUND, "the run has no such samples")
        return self._answer(HTTPStatus.OK, found, "application/json")

    def _refuse(self, status: HTTPStatus, why: str) -> None:
        self._answer(status, why, "text/plain")

    def _answer(self, status: HTTPStatus, text: str, kind: str, headers: dict[str, str] | None = None) -> None:
        body = cleaned(text).encode()
        zipped = "gzip" in (self.headers.get("Accept-Encoding") or "")
        if zipped:
            body = gzip.compress(body, 1)
        self.send_response(status)
        found = HEADERS | (headers or {}) | ({"Content-Encoding": "gzip"} if zipped else {})
        if status is not HTTPStatus.NOT_MODIFIED:
            found |= {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(body))}
        for name, value in found.items():
            self.send_header(name, value)
        self.end_headers()
        if status is not HTTPStatus.NOT_MODIFIED:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: a line for each request would hide the address."""


class Server(ThreadingHTTPServer):
    """Serves a live report at `address`. Raises OSError for a port that cannot be used."""

    daemon_threads = True

    def __init__(self, report: LiveReport, port: int) -> None:
        self.report = report
        self.secret = secrets.token_urlsafe(16)
        super().__init__((HOST, port), Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away in the middle of an answer is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @property
    def address(self) -> str:
        """Where a browser finds the page."""
        return f"http://{HOST}:{self.server_port}/{self.secret}/"


def serve_report(run: Path, port: int) -> None:
    """Serve the live report on the run directory `run` until Ctrl-C; port 0 is any free one.

    Raises UserError for what is no run, for a damaged file in it, and for a port that cannot be used.
    """
    report = LiveReport(run)
    try:
        server = Server(report, port)
    except OSError as error:
        raise UserError(
            f"--port {port} cannot be used ({error.strerror}); give another, or leave it out for a free one"
        ) from None
    with server:
        print(f"the report is at {server.address} and follows the run; Ctrl-C ends it", flush=True)
        with suppress(KeyboardInterrupt):
            server.serve_forever()
        print("the report is no longer served; the run itself is not affected")
