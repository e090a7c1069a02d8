"""The local Hub, seen by the real client: here through `HfApi`, and by transformers in its own process."""

import os
import subprocess
import sys
import urllib.request

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hfquant.testing.fakehub import FakeHub

PUSH_AND_LOAD = """
import torch
from hfquant.testing.tiny import tiny_inputs, tiny_model
from transformers import AutoModelForCausalLM

model = tiny_model("llama", dtype=torch.bfloat16)
for repo, shard in (("me/single", "1GB"), ("me/sharded", "100KB")):
    model.push_to_hub(repo, max_shard_size=shard)
    again = AutoModelForCausalLM.from_pretrained(repo)
    assert again.dtype == torch.bfloat16
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with torch.no_grad():
        assert torch.equal(again(**tiny_inputs(again)).logits, model(**tiny_inputs(model)).logits)
"""


@pytest.fixture
def hub():
    with FakeHub() as running:
        yield running


@pytest.fixture
def api(hub, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    return HfApi(endpoint=hub.endpoint, token=hub.token)


@pytest.fixture
def repo(api):
    api.create_repo("me/model")
    return "me/model"


def upload(api, repo, path, content):
    """Commit one file and return the sha."""
    return api.upload_file(path_or_fileobj=content, path_in_repo=path, repo_id=repo).oid


def download(api, repo, path, folder, revision="main"):
    with open(api.hf_hub_download(repo, path, revision=revision, cache_dir=folder), "rb") as file:
        return file.read()


@pytest.mark.parametrize("lfs_from", [None, 1000], ids=["regular", "lfs"])
def test_transformers_pushes_and_loads(lfs_from, tmp_path):
    with FakeHub(lfs_from=lfs_from) as hub:
        run = subprocess.run(
            [sys.executable, "-c", PUSH_AND_LOAD],
            env={**os.environ, **hub.environment()},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        assert "model.safetensors" in hub.repos["me/single"].files
        sharded = [path for path in hub.repos["me/sharded"].files if path.endswith(".safetensors")]
        assert len(sharded) > 1
        assert bool(hub.blobs) == (lfs_from is not None)


@pytest.mark.parametrize("lfs_from", [None, 10], ids=["regular", "lfs"])
def test_content_survives(hub, api, repo, tmp_path, lfs_from):
    hub.lfs_from = lfs_from
    for content in (b"short", bytes(range(256)) * 4):
        upload(api, repo, "data/weights.bin", content)
        assert download(api, repo, "data/weights.bin", tmp_path) == content
    assert len(hub.blobs) == (0 if lfs_from is None else 1)


def test_old_commits_stay_readable(api, repo, tmp_path):
    first = upload(api, repo, "config.json", b"1")
    second = upload(api, repo, "config.json", b"2")
    assert first != second == api.model_info(repo).sha
    assert download(api, repo, "config.json", tmp_path, first) == b"1"
    assert download(api, repo, "config.json", tmp_path) == b"2"
    assert api.model_info(repo, revision=first).sha == first


def test_files_are_listed_and_deleted(api, repo):
    upload(api, repo, "config.json", b"{}")
    upload(api, repo, "sub folder/a.txt", b"a")
    assert sorted(api.list_repo_files(repo)) == ["config.json", "sub folder/a.txt"]
    assert [e.path for e in api.list_repo_tree(repo, "sub folder")] == ["sub folder/a.txt"]
    api.delete_file("config.json", repo)
    assert api.list_repo_files(repo) == ["sub folder/a.txt"]


def test_what_is_not_there_raises_the_hubs_own_errors(api, repo, tmp_path):
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("me/absent")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(repo, revision="0" * 40)
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download(repo, "absent.json", cache_dir=tmp_path)
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(repo, "absent"))


def test_existing_repo_conflicts_unless_allowed(api, repo):
    assert api.create_repo(repo, exist_ok=True).repo_id == repo
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(repo)


def test_writing_needs_the_token_and_reading_does_not(hub, api, repo, tmp_path):
    upload(api, repo, "config.json", b"{}")
    stranger = HfApi(endpoint=hub.endpoint, token="hf_other")
    assert download(stranger, repo, "config.json", tmp_path) == b"{}"
    with pytest.raises(HfHubHTTPError, match="401"):
        upload(stranger, repo, "config.json", b"[]")
    with pytest.raises(HfHubHTTPError, match="401"):
        stranger.create_repo("me/other")


def test_damaged_lfs_upload_is_refused(hub):
    assert hub.answer("PUT", f"/lfs/{'0' * 64}", b"content", None).status == 400
    assert not hub.blobs


def test_a_fault_of_the_hub_reaches_the_client(hub):
    answer = hub.answer("POST", "/api/repos/create", b"not json", hub.token)
    assert answer.status == 500 and b"JSONDecodeError" in answer.body


def test_hubs_share_nothing(hub, api, repo):
    with FakeHub(user="you") as other:
        assert other.repos == {} and other.requests == []
        assert other.endpoint != hub.endpoint
        assert HfApi(endpoint=other.endpoint, token=other.token).whoami()["name"] == "you"
    assert list(hub.repos) == [repo]


def test_environment_points_to_it_and_away_from_the_users_cache(hub):
    environment = hub.environment()
    assert environment["HF_ENDPOINT"] == hub.endpoint
    assert environment["HF_TOKEN"] == hub.token
    assert environment["HF_HUB_DISABLE_XET"] == "1"
    assert os.path.isdir(environment["HF_HOME"])


def test_requests_are_logged_and_the_server_stops(api, hub, repo):
    assert "POST /api/repos/create" in hub.requests
    with FakeHub() as stopped:
        home = stopped.environment()["HF_HOME"]
    assert not os.path.exists(home)
    with pytest.raises(OSError):
        urllib.request.urlopen(stopped.endpoint, timeout=2)
