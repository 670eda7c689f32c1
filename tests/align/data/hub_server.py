"""A stand-in for the Hugging Face hub on this machine: the part of its HTTP interface by which files of data sets are found and fetched."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
GATED = "org/gated"


@contextmanager
def hub(data_sets: Mapping[str, Mapping[str, bytes]]) -> Iterator[tuple[str, list[str]]]:
    """Serve data sets, each as its files by name. Yields the address, and a list to which the paths of the requests are added.

    `main` and COMMIT are the revisions of all. GATED is there, and lets nobody in.
    """
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def refuse(self, status: int, code: str) -> None:
            self.answer(status, json.dumps({"error": code}).encode(), X_Error_Code=code, X_Error_Message=code)

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            asked.append(f"{self.command} {path}")
            parts = path.removeprefix("/api").removeprefix("/datasets/").split("/")
            name, rest = "/".join(parts[:2]), parts[2:]
            if name == GATED and "resolve" in rest:
                return self.refuse(403, "GatedRepo")
            if name != GATED and name not in data_sets:
                return self.refuse(401, "RepoNotFound")
            files = data_sets.get(name, {"train.jsonl": b""})
            if len(rest) > 1 and rest[1] not in ("main", COMMIT):
                return self.refuse(404, "RevisionNotFound")
            if not path.startswith("/api"):
                file = "/".join(rest[2:])
                if file not in files:
                    return self.refuse(404, "EntryNotFound")
                etag = f'"{hashlib.sha1(files[file]).hexdigest()}"'
                return self.answer(200, files[file], ETag=etag, X_Repo_Commit=COMMIT)
            length = int(self.headers.get("Content-Length") or 0)
            self.rfile.read(length)
            entries = [
                {"type": "file", "path": one, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for one, content in files.items()
            ]
            if "tree" in rest:
                below = "".join(f"{part}/" for part in rest[2:])
                found = [entry for entry in entries if str(entry["path"]).startswith(below)]
                directories = {f"{below}{str(e['path']).removeprefix(below).partition('/')[0]}" for e in found}
                directories -= set(files)
                if "recursive=true" not in self.path.lower():
                    found = [entry for entry in found if str(entry["path"]).removeprefix(below).count("/") == 0]
                found += [{"type": "directory", "path": one, "size": 0, "oid": COMMIT} for one in sorted(directories)]
                return self.answer(200, json.dumps(found).encode())
            if "paths-info" in rest:
                return self.answer(200, json.dumps(entries).encode())
            siblings = [{"rfilename": one} for one in files]
            about = {
                "id": name,
                "sha": COMMIT,
                "siblings": siblings,
                "private": False,
                "gated": name == GATED,
                "tags": [],
            }
            return self.answer(200, json.dumps(about).encode())

        do_HEAD = do_POST = do_GET  # noqa: N815

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
