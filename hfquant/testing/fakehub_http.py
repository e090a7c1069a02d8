"""HTTP for the local Hub: the messages it exchanges, and the server that carries them on 127.0.0.1."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Request:
    """Body of a request and the named parts of its path, decoded."""

    body: bytes
    params: Mapping[str, str]

    def json(self) -> Any:
        """Body parsed as JSON."""
        return json.loads(self.body)

    def json_lines(self) -> list[Any]:
        """Body parsed as one JSON value per line."""
        return [json.loads(line) for line in self.body.splitlines() if line]


@dataclass(frozen=True)
class Response:
    """Status, body and headers to send; `Content-Length` is added when it is sent."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


class Refusal(Exception):
    """An error answer; `code` is the `X-Error-Code` that `huggingface_hub` turns into an exception class."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {
            "X-Error-Message": message,
            **({"X-Error-Code": code} if code else {}),
            **(headers or {}),
        }

    def response(self) -> Response:
        """The answer to send."""
        return json_response({"error": str(self)}, status=self.status, headers=self.headers)


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """An answer that carries `value` as JSON."""
    return Response(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})


Answer = Callable[[str, str, bytes, str | None], Response]
"""Answers a request given its method, percent-encoded path, body and bearer token."""


class Server(ThreadingHTTPServer):
    """Listens on a free port from construction on, and passes every request to `answer`."""

    daemon_threads = True

    def __init__(self, answer: Answer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def _handle(self) -> None:
        bearer = self.headers.get("Authorization", "")
        token = bearer.removeprefix("Bearer ") or None
        response = self.server.answer(self.command, urlsplit(self.path).path, self._read_body(), token)
        self.send_response(response.status)
        for name, value in {**response.headers, "Content-Length": str(len(response.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            return b"".join(iter(self._read_chunk, b""))
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _read_chunk(self) -> bytes:
        """Read one chunk; empty at the end of the body."""
        size = int(self.rfile.readline().split(b";")[0], 16)
        chunk = self.rfile.read(size)
        self.rfile.readline()
        return chunk

    def log_message(self, format: str, *args: object) -> None:
        """Stay quiet: `FakeHub.requests` is the log."""
