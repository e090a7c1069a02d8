"""A small stand-in for the Hugging Face Hub on 127.0.0.1: enough for `push_to_hub` and `from_pretrained`.

One branch, `main`; every commit stays readable under its own sha. Models only, no xet, no pull requests.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]
"""Content of a repository at one commit, by path."""

MAIN = "main"


@dataclass
class Repo:
    """One model repository: every commit's files by sha (40 hex digits), and the sha `main` points at."""

    commits: dict[str, Files] = field(default_factory=dict)
    head: str = ""

    @property
    def files(self) -> Files:
        """Files at the head of `main`."""
        return self.commits[self.head]

    def commit(self, files: Files) -> str:
        """Make `files` the new head and return its sha."""
        listing = [self.head, *sorted(f"{path} {_git_oid(content)}" for path, content in files.items())]
        self.head = hashlib.sha1("\n".join(listing).encode()).hexdigest()
        self.commits[self.head] = files
        return self.head

    def resolve(self, revision: str) -> str:
        """Return the sha of `revision`. Raises `_Refusal` (404) when no commit has that name."""
        sha = self.head if revision == MAIN else revision
        if sha not in self.commits:
            raise _Refusal(404, "RevisionNotFound", f"no revision {revision!r}")
        return sha


class FakeHub:
    """Local Hub for one user; `with FakeHub() as hub` serves at `hub.endpoint` until the block ends.

    Files of `lfs_from` bytes or more are uploaded the Git LFS way; `None` sends all inside the commit.
    """

    def __init__(self, user: str = "me", token: str = "hf_local", lfs_from: int | None = None) -> None:
        self.user = user
        self.token = token
        self.lfs_from = lfs_from
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}  # LFS uploads by sha256
        self.requests: list[str] = []  # "METHOD path", in order of arrival, for assertions and debugging
        self._lock = threading.Lock()
        self._server = _Server(self)
        self._home = tempfile.TemporaryDirectory(prefix="fakehub-")

    @property
    def endpoint(self) -> str:
        """Base URL, without a trailing slash."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def environment(self) -> dict[str, str]:
        """Variables for a subprocess that should use this Hub, read when it imports `huggingface_hub`.

        `HF_HOME` is a folder of this Hub, so that nothing of it lands in the user's own cache.
        """
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": self.token,
            "HF_HOME": self._home.name,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._home.cleanup()

    def answer(self, method: str, path: str, body: bytes, token: str | None) -> Response:
        """Answer one request. `path` is the percent-encoded URL path; HEAD is answered as GET."""
        with self._lock:
            self.requests.append(f"{method} {path}")
            try:
                return self._dispatch("GET" if method == "HEAD" else method, path, body, token)
            except _Refusal as refusal:
                return refusal.response()
            except Exception:  # a bug here must reach the client's error message, not only this process's stderr
                return _json({"error": traceback.format_exc()}, status=500)

    def _dispatch(self, method: str, path: str, body: bytes, token: str | None) -> Response:
        for route in ROUTES:
            match = route.regex.fullmatch(path) if route.method == method else None
            if match is None:
                continue
            if route.needs_token and token != self.token:
                raise _Refusal(401, "", "Invalid username or password.")
            params = {name: unquote(value) for name, value in match.groupdict().items()}
            return route.handler(self, Request(body, params))
        raise _Refusal(404, "EntryNotFound", f"no route for {method} {path}")

    def find(self, repo_id: str) -> Repo:
        """Return the repository. Raises `_Refusal` (404) when it was never created."""
        if repo_id not in self.repos:
            raise _Refusal(404, "RepoNotFound", f"no repository {repo_id!r}")
        return self.repos[repo_id]


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


class _Refusal(Exception):
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
        return _json({"error": str(self)}, status=self.status, headers=self.headers)


def _json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


# ---- what each route does


def _whoami(hub: FakeHub, request: Request) -> Response:
    auth = {"accessToken": {"displayName": "local", "role": "write"}}
    return _json({"type": "user", "id": "0", "name": hub.user, "orgs": [], "auth": auth})


def _validate_card(hub: FakeHub, request: Request) -> Response:
    return _json({"errors": [], "warnings": []})


def _create_repo(hub: FakeHub, request: Request) -> Response:
    asked = request.json()
    repo_id = f"{asked.get('organization') or hub.user}/{asked['name']}"
    known = repo_id in hub.repos
    if not known:
        hub.repos[repo_id] = Repo()
        hub.repos[repo_id].commit({})
    # Clients that passed exist_ok take the URL from the 409 answer as well.
    return _json({"url": f"{hub.endpoint}/{repo_id}", "name": repo_id, "id": "0"}, status=409 if known else 200)


def _preupload(hub: FakeHub, request: Request) -> Response:
    hub.find(request.params["repo"])

    def mode(size: int) -> str:
        return "lfs" if hub.lfs_from is not None and size >= hub.lfs_from else "regular"

    asked = request.json()["files"]
    files = [{"path": f["path"], "uploadMode": mode(f["size"]), "shouldIgnore": False} for f in asked]
    return _json({"files": files})


def _lfs_batch(hub: FakeHub, request: Request) -> Response:
    hub.find(request.params["repo"])
    objects = [{"oid": o["oid"], "size": o["size"]} for o in request.json()["objects"]]
    for blob in objects:
        if blob["oid"] not in hub.blobs:  # an object without actions is one the client need not send again
            blob["actions"] = {"upload": {"href": f"{hub.endpoint}/lfs/{blob['oid']}"}}
    return _json({"transfer": "basic", "objects": objects}, headers={"Content-Type": "application/vnd.git-lfs+json"})


def _lfs_upload(hub: FakeHub, request: Request) -> Response:
    oid = request.params["oid"]
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise _Refusal(400, "", f"the {len(request.body)} bytes received do not hash to {oid}")
    hub.blobs[oid] = request.body
    return Response()


def _commit(hub: FakeHub, request: Request) -> Response:
    repo_id = request.params["repo"]
    repo = hub.find(repo_id)
    if request.params["revision"] != MAIN:
        raise _Refusal(404, "RevisionNotFound", f"only {MAIN!r} takes commits, not {request.params['revision']!r}")
    files = dict(repo.files)
    for line in request.json_lines():
        _apply(hub, files, line["key"], line["value"])
    sha = repo.commit(files)
    url = f"{hub.endpoint}/{repo_id}/commit/{sha}"
    return _json({"success": True, "commitUrl": url, "commitOid": sha, "pullRequestUrl": None})


def _apply(hub: FakeHub, files: Files, key: str, value: Mapping[str, Any]) -> None:
    """Apply one line of a commit to `files`."""
    if key == "file":
        files[value["path"]] = base64.b64decode(value["content"])
    elif key == "lfsFile":
        files[value["path"]] = hub.blobs[value["oid"]]
    elif key == "deletedFile":
        del files[value["path"]]
    elif key != "header":  # the header holds only the commit message
        raise _Refusal(400, "", f"commit operation {key!r} is not supported")


def _resolve(hub: FakeHub, request: Request) -> Response:
    repo = hub.find(request.params["repo"])
    sha = repo.resolve(request.params["revision"])
    at_commit = {"X-Repo-Commit": sha}
    path = request.params["path"]
    if path not in repo.commits[sha]:
        raise _Refusal(404, "EntryNotFound", f"no file {path!r} at {sha}", at_commit)
    content = repo.commits[sha][path]
    headers = {
        "Content-Type": "application/octet-stream",
        "ETag": f'"{_git_oid(content)}"',
        "Accept-Ranges": "none",
    }
    return Response(200, content, {**headers, **at_commit})


def _tree(hub: FakeHub, request: Request) -> Response:
    repo = hub.find(request.params["repo"])
    sha = repo.resolve(request.params["revision"])
    folder = request.params.get("path", "")
    prefix = f"{folder}/" if folder else ""
    files = {path: content for path, content in repo.commits[sha].items() if path.startswith(prefix)}
    if folder and not files:
        raise _Refusal(404, "EntryNotFound", f"no folder {folder!r} at {sha}", {"X-Repo-Commit": sha})
    entries = [{"type": "file", "oid": _git_oid(c), "size": len(c), "path": path} for path, c in files.items()]
    return _json(entries)


def _model_info(hub: FakeHub, request: Request) -> Response:
    repo_id = request.params["repo"]
    repo = hub.find(repo_id)
    sha = repo.resolve(request.params.get("revision", MAIN))
    siblings = [{"rfilename": path} for path in repo.commits[sha]]
    info = {"_id": "0", "id": repo_id, "modelId": repo_id, "sha": sha, "private": False, "siblings": siblings}
    return _json({**info, "tags": [], "downloads": 0, "likes": 0})


# ---- which route does it


@dataclass(frozen=True)
class Route:
    """Method and path template of one kind of request, its handler, and whether it needs the token."""

    method: str
    template: str
    handler: Callable[[FakeHub, Request], Response]
    needs_token: bool = False
    regex: re.Pattern[str] = field(init=False)

    def __post_init__(self) -> None:
        # "{repo}" spans owner and name, "{path}" any depth, every other name one segment.
        spans = {"repo": "[^/]+/[^/]+", "path": ".+"}
        pattern = re.sub(
            r"{(\w+)}",
            lambda name: f"(?P<{name[1]}>{spans.get(name[1], '[^/]+')})",
            self.template.replace(".", r"\."),
        )
        object.__setattr__(self, "regex", re.compile(pattern))


# The first match answers, so fixed paths stand before "{repo}" ones.
ROUTES = (
    Route("GET", "/api/whoami-v2", _whoami, needs_token=True),
    Route("POST", "/api/validate-yaml", _validate_card),
    Route("POST", "/api/repos/create", _create_repo, needs_token=True),
    Route("POST", "/api/models/{repo}/preupload/{revision}", _preupload, needs_token=True),
    Route("POST", "/{repo}.git/info/lfs/objects/batch", _lfs_batch, needs_token=True),
    Route("PUT", "/lfs/{oid}", _lfs_upload),  # no token: the Hub hands out presigned storage URLs here
    Route("POST", "/api/models/{repo}/commit/{revision}", _commit, needs_token=True),
    Route("GET", "/{repo}/resolve/{revision}/{path}", _resolve),
    Route("GET", "/api/models/{repo}/tree/{revision}", _tree),
    Route("GET", "/api/models/{repo}/tree/{revision}/{path}", _tree),
    Route("GET", "/api/models/{repo}/revision/{revision}", _model_info),
    Route("GET", "/api/models/{repo}", _model_info),
)


# ---- HTTP


class _Server(ThreadingHTTPServer):
    """Listens on a free port from construction on; belongs to one hub."""

    daemon_threads = True

    def __init__(self, hub: FakeHub) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def _handle(self) -> None:
        bearer = self.headers.get("Authorization", "")
        token = bearer.removeprefix("Bearer ") or None
        response = self.server.hub.answer(self.command, urlsplit(self.path).path, self._read_body(), token)
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
