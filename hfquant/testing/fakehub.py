"""A small stand-in for the Hugging Face Hub on 127.0.0.1: enough for `push_to_hub` and `from_pretrained`.

One branch, `main`; every commit stays readable under its own sha. Models only, no xet, no pull requests.
"""

from __future__ import annotations

import base64
import hashlib
import re
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from .fakehub_http import Refusal, Request, Response, Server, json_response

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
        """Return the sha of `revision`. Raises `Refusal` (404) when no commit has that name."""
        sha = self.head if revision == MAIN else revision
        if sha not in self.commits:
            raise Refusal(404, "RevisionNotFound", f"no revision {revision!r}")
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
        self._server = Server(self.answer)
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
            except Refusal as refusal:
                return refusal.response()
            except Exception:  # a bug here must reach the client's error message, not only this process's stderr
                return json_response({"error": traceback.format_exc()}, status=500)

    def _dispatch(self, method: str, path: str, body: bytes, token: str | None) -> Response:
        for route in ROUTES:
            match = route.regex.fullmatch(path) if route.method == method else None
            if match is None:
                continue
            if route.needs_token and token != self.token:
                raise Refusal(401, "", "Invalid username or password.")
            params = {name: unquote(value) for name, value in match.groupdict().items()}
            return route.handler(self, Request(body, params))
        raise Refusal(404, "EntryNotFound", f"no route for {method} {path}")

    def find(self, repo_id: str) -> Repo:
        """Return the repository. Raises `Refusal` (404) when it was never created."""
        if repo_id not in self.repos:
            raise Refusal(404, "RepoNotFound", f"no repository {repo_id!r}")
        return self.repos[repo_id]


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


# ---- what each route does


def _whoami(hub: FakeHub, request: Request) -> Response:
    auth = {"accessToken": {"displayName": "local", "role": "write"}}
    return json_response({"type": "user", "id": "0", "name": hub.user, "orgs": [], "auth": auth})


def _validate_card(hub: FakeHub, request: Request) -> Response:
    return json_response({"errors": [], "warnings": []})


def _create_repo(hub: FakeHub, request: Request) -> Response:
    asked = request.json()
    repo_id = f"{asked.get('organization') or hub.user}/{asked['name']}"
    known = repo_id in hub.repos
    if not known:
        hub.repos[repo_id] = Repo()
        hub.repos[repo_id].commit({})
    # Clients that passed exist_ok take the URL from the 409 answer as well.
    return json_response({"url": f"{hub.endpoint}/{repo_id}", "name": repo_id, "id": "0"}, status=409 if known else 200)


def _preupload(hub: FakeHub, request: Request) -> Response:
    hub.find(request.params["repo"])

    def mode(size: int) -> str:
        return "lfs" if hub.lfs_from is not None and size >= hub.lfs_from else "regular"

    asked = request.json()["files"]
    files = [{"path": f["path"], "uploadMode": mode(f["size"]), "shouldIgnore": False} for f in asked]
    return json_response({"files": files})


def _lfs_batch(hub: FakeHub, request: Request) -> Response:
    hub.find(request.params["repo"])
    objects = [{"oid": o["oid"], "size": o["size"]} for o in request.json()["objects"]]
    for blob in objects:
        if blob["oid"] not in hub.blobs:  # an object without actions is one the client need not send again
            blob["actions"] = {"upload": {"href": f"{hub.endpoint}/lfs/{blob['oid']}"}}
    return json_response(
        {"transfer": "basic", "objects": objects}, headers={"Content-Type": "application/vnd.git-lfs+json"}
    )


def _lfs_upload(hub: FakeHub, request: Request) -> Response:
    oid = request.params["oid"]
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise Refusal(400, "", f"the {len(request.body)} bytes received do not hash to {oid}")
    hub.blobs[oid] = request.body
    return Response()


def _commit(hub: FakeHub, request: Request) -> Response:
    repo_id = request.params["repo"]
    repo = hub.find(repo_id)
    if request.params["revision"] != MAIN:
        raise Refusal(404, "RevisionNotFound", f"only {MAIN!r} takes commits, not {request.params['revision']!r}")
    files = dict(repo.files)
    for line in request.json_lines():
        _apply(hub, files, line["key"], line["value"])
    sha = repo.commit(files)
    url = f"{hub.endpoint}/{repo_id}/commit/{sha}"
    return json_response({"success": True, "commitUrl": url, "commitOid": sha, "pullRequestUrl": None})


def _apply(hub: FakeHub, files: Files, key: str, value: Mapping[str, Any]) -> None:
    """Apply one line of a commit to `files`."""
    if key == "file":
        files[value["path"]] = base64.b64decode(value["content"])
    elif key == "lfsFile":
        files[value["path"]] = hub.blobs[value["oid"]]
    elif key == "deletedFile":
        del files[value["path"]]
    elif key != "header":  # the header holds only the commit message
        raise Refusal(400, "", f"commit operation {key!r} is not supported")


def _resolve(hub: FakeHub, request: Request) -> Response:
    repo = hub.find(request.params["repo"])
    sha = repo.resolve(request.params["revision"])
    at_commit = {"X-Repo-Commit": sha}
    path = request.params["path"]
    if path not in repo.commits[sha]:
        raise Refusal(404, "EntryNotFound", f"no file {path!r} at {sha}", at_commit)
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
        raise Refusal(404, "EntryNotFound", f"no folder {folder!r} at {sha}", {"X-Repo-Commit": sha})
    entries = [{"type": "file", "oid": _git_oid(c), "size": len(c), "path": path} for path, c in files.items()]
    return json_response(entries)


def _model_info(hub: FakeHub, request: Request) -> Response:
    repo_id = request.params["repo"]
    repo = hub.find(repo_id)
    sha = repo.resolve(request.params.get("revision", MAIN))
    siblings = [{"rfilename": path} for path in repo.commits[sha]]
    info = {"_id": "0", "id": repo_id, "modelId": repo_id, "sha": sha, "private": False, "siblings": siblings}
    return json_response({**info, "tags": [], "downloads": 0, "likes": 0})


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
