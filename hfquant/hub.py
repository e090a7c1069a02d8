"""The way to the Hub for what is on the disk."""

from __future__ import annotations

from pathlib import Path

from .errors import SpecError


def check_repository(name: str) -> None:
    """Raise SpecError for what is no name of a repository."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise SpecError(f"{name!r} is no name of a repository on the Hub: {error}") from error


def push_folder(folder: str | Path, repository: str, private: bool = True) -> str:
    """Upload everything in `folder` to `repository`, which is made if it is not there; its address.

    Raises OSError if the Hub cannot be reached or refuses; the folder stays as it is.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=str(folder), commit_message="Upload with hfquant")
    except OSError as error:
        raise OSError(
            f"{folder} is finished, and could not be uploaded to {repository}: {error}. Log in with `hf auth login`, "
            f"then upload it with `hf upload {repository} {folder}`"
        ) from error
    return str(url)
