"""A stand-in for the Hugging Face hub: the part of its HTTP interface that takes uploads, with its files in memory."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0

    @property
    def sha(self) -> str:
        return f"{self.commits:040x}"


@dataclass
class Hub:
    """What the server holds. `writers` are the tokens that may write, `readers` those that are known besides."""

    writers: set[str]
    readers: set[str] = field(default_factory=set)
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    url: str = ""
    changes_meanwhile: bool = False

    def answer(self, method: str, path: str, token: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        """Status, content (JSON) and headers of the answer to a request."""
        self.asked.append(f"{method} {path.partition('?')[0]}")
        parts = path.partition("?")[0].strip("/").split("/")
        if parts[0] == "objects":
            self.objects[parts[1]] = body
            return 200, {}, {}
        if token not in self.writers | self.readers:
            return 401, {}, {"X-Error-Message": "Invalid credentials in Authorization header"}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            if token not in self.writers:
                return 403, {}, {"X-Error-Message": "You don't have the rights"}
            private = asked.get("private", asked.get("visibility") == "private")
            self.repositories[name] = Repository(bool(private))
            return 200, {"url": f"{self.url}/{name}"}, {}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}, {}
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2]).removesuffix(".git")
        if (repository := self.repositories.get(name)) is None:
            return 404, {}, {"X-Error-Code": "RepoNotFound"}
        if parts[-2:] == ["preupload", "main"]:
            modes = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(body)["files"]
            ]
            return 200, {"files": modes}, {}
        if parts[-1] == "batch":
            asked = json.loads(body)["objects"]
            links = [o | {"actions": {"upload": {"href": f"{self.url}/objects/{o['oid']}"}}} for o in asked]
            return 200, {"transfer": "basic", "objects": links}, {}
        if parts[-2:] == ["commit", "main"]:
            return self.commit(repository, name, [json.loads(line) for line in body.splitlines()])
        return 200, self.described(repository, name), {}

    def commit(self, repository: Repository, name: str, lines: list[dict[str, Any]]) -> tuple[int, Any, dict[str, str]]:
        if self.changes_meanwhile or lines[0]["value"].get("parentCommit") != repository.sha:
            return 412, {}, {"X-Error-Message": "A commit has happened since"}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            else:
                content = self.objects[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                repository.files[value["path"]] = content
        repository.commits += 1
        return 200, {"commitUrl": f"{self.url}/{name}/commit/{repository.sha}", "commitOid": repository.sha}, {}

    def described(self, repository: Repository, name: str) -> dict[str, Any]:
        files = [{"rfilename": file} for file in (".gitattributes", *repository.files)]
        return {"id": name, "sha": repository.sha, "private": repository.private, "siblings": files, "tags": []}


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve it on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            status, content, headers = hub.answer(self.command, self.path, token, body)
            text = json.dumps(content).encode()
            self.send_response(status)
            for key, value in {"Content-Type": "application/json", "Content-Length": str(len(text)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_HEAD = do_POST = do_PUT = _answer  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=lambda: server.serve_forever(0.01), daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
