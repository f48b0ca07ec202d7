"""Uploading an exported model to the Hugging Face hub, with the user's own login."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from dat_ds.errors import ExportError

_REFUSED = (401, 403)


def check_repository(repository: str) -> Iterator[str]:
    """A problem where ``repository`` cannot be the id of one."""
    try:
        validate_repo_id(repository)
        valid = repository.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        yield f"--push {repository!r} is not a repository on the hub: write USER/NAME."


def describe_upload(folder: Path, repository: str) -> str:
    """Every file that an upload would send, with its size in bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"To upload to https://huggingface.co/{repository}, made (private) if need be:"]
    lines += [
        f"  {file.relative_to(folder).as_posix()}  {file.stat().st_size:,} bytes" for file in files
    ]
    return "\n".join(lines)


def upload(folder: Path, repository: str) -> str:
    """Upload a folder's files; a repository that is not there is made, private.

    Args:
        folder: An exported model.
        repository: ``USER/NAME``.

    Returns:
        The address of the commit.

    Raises:
        ExportError: Nobody is logged in, the hub cannot be reached, or it refuses.
    """
    api, user = HfApi(), "unknown"
    later = f"The export is in {folder}; upload it later: hf upload {repository} {folder}"
    try:
        user = api.whoami()["name"]
        api.create_repo(repository, repo_type="model", private=True, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            repo_type="model",
            commit_message="Export of dat_ds",
        )
    except LocalTokenNotFoundError:
        raise ExportError(
            f"--push {repository}: nobody is logged in to the hub. Type: hf auth login. {later}"
        ) from None
    except (HfHubHTTPError, RepositoryNotFoundError) as error:
        status = getattr(error.response, "status_code", None)
        if status == _REFUSED[0]:
            reason = "the hub does not accept the login; type: hf auth login"
        elif status in _REFUSED or isinstance(error, RepositoryNotFoundError):
            reason = f"the login ({user}) may not write there; the token needs the role 'write'"
        else:
            reason = str(error).splitlines()[0]
        raise ExportError(f"--push {repository}: {reason}. {later}") from None
    except Exception as error:  # no network, HF_HUB_OFFLINE: of whatever HTTP library it uses
        raise ExportError(
            f"--push {repository}: the hub cannot be reached ({error}). {later}"
        ) from None
    return str(commit.commit_url)
