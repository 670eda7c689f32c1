"""A judge for tests: a real HTTP server that speaks the chat completions API, as well or as badly as it is told to."""

import json
import threading
from collections.abc import Callable, Collection
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = str | tuple[int, str]


class Server:
    """A judge on 127.0.0.1 that answers by a function of the prompt: with a text, or with a status and a body.

    Requests with a parameter that is `unsupported` are refused as OpenAI refuses them.
    """

    def __init__(self, reply: Callable[[str], Reply], unsupported: Collection[str] = ()):
        self.prompts: list[str] = []
        self.last: dict[str, Any] = {}
        self.keys: set[str | None] = set()
        self.busiest = self._busy = 0
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.last = body
                answer: Reply
                if refused := [name for name in body if name in unsupported]:
                    refusal = {"message": f"Unsupported parameter: {refused[0]!r}", "param": refused[0]}
                    answer = 400, json.dumps({"error": refusal})
                else:
                    answer = server.answer(reply, body["messages"][0]["content"], self.headers["Authorization"])
                message = {"role": "assistant", "content": answer}
                choices = [{"index": 0, "finish_reason": "stop", "message": message}]
                completion = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": choices}
                status, text = (200, json.dumps(completion)) if isinstance(answer, str) else answer
                with suppress(BrokenPipeError):  # nobody waited for a slow answer
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.end_headers()
                    self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, reply: Callable[[str], Reply], prompt: str, key: str | None) -> Reply:
        with self._lock:
            self.prompts.append(prompt)
            self.keys.add(key)
            self._busy += 1
            self.busiest = max(self.busiest, self._busy)
        try:
            return reply(prompt)
        finally:
            with self._lock:
                self._busy -= 1

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
