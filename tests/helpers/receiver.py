"""A web server that is told what happens to jobs, and can be down."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from helpers.daemon import free_port
from helpers.waiting import DEADLINE_S


class Receiver:
    """Listens while it is up; keeps the messages and their headers."""

    def __init__(self, port: int | None = None) -> None:
        self.port = port or free_port()
        self.messages: list[dict[str, Any]] = []
        self.headers: list[Mapping[str, str]] = []
        self.status = 200
        self._server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/services/URL-SECRET"

    @property
    def told(self) -> list[tuple[str, str]]:
        """Return job and kind of each notice, in order."""
        return [(each["job"], each["kind"]) for message in self.messages for each in message["notices"]]

    def up(self) -> None:
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(receiver.status)
                self.end_headers()
                receiver.headers.append(dict(self.headers))
                receiver.messages.append(json.loads(body))

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def down(self) -> None:
        if self._server:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join(DEADLINE_S)
            self._server = None
