"""An exported folder onto the Hugging Face hub, without ever overwriting what is there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from huggingface_hub import HfApi, errors

from sst_jax.errors import InputError

Result = TypeVar("Result")
_OWN = {".gitattributes"}  # what a new repository comes with


@runtime_checkable
class Hub(Protocol):
    """What is asked of `huggingface_hub.HfApi`."""

    def model_info(self, repo_id: str) -> Any: ...
    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> Any: ...
    def upload_folder(
        self, *, repo_id: str, folder_path: Path, commit_message: str, parent_commit: str | None
    ) -> Any: ...


def check(repo: str, force: bool, api: Hub | None = None) -> str | None:
    """Return the newest commit of a model repository, or None where it does not exist yet; nothing is written.

    Raises: InputError where the repository holds files and `force` is off, on a malformed id, where the hub refuses.
    """
    api = api or _api()
    try:
        info = _asked(repo, lambda: api.model_info(repo))
    except errors.RepositoryNotFoundError:
        return None
    held = sorted({part.rfilename for part in info.siblings or ()} - _OWN)
    if held and not force:
        raise InputError(
            f"--push {repo} already holds {held[0]}"
            + (f" and {len(held) - 1} more files" if len(held) > 1 else "")
            + ": nothing is overwritten, choose another name or add --force"
        )
    return info.sha


def push(folder: Path, repo: str, *, force: bool, private: bool, message: str, api: Hub | None = None) -> str:
    """Upload a folder in one commit and return its address; a new repository is made private unless told otherwise.

    Raises: InputError as `check`, and where another wrote to the repository in the meantime.
    """
    api = api or _api()
    _asked(repo, lambda: api.create_repo(repo, private=private, exist_ok=True))
    head = check(repo, force, api)
    # parent_commit: the hub refuses the commit where the repository is no longer the one that was looked at.
    done = _asked(
        repo, lambda: api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message, parent_commit=head)
    )
    return str(done.commit_url)


def _api() -> Hub:
    return HfApi(library_name="sst_jax")


def _asked(repo: str, request: Callable[[], Result]) -> Result:
    """Return what the hub answers; its refusals as InputError, but for a repository that does not exist."""
    try:
        return request()
    except errors.RepositoryNotFoundError:
        raise
    except errors.HFValidationError as error:
        raise InputError(f"--push {repo} is not a hub id (owner/name): {error}") from error
    except Exception as error:  # the hub's client lets its transport's many exceptions through
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"--push {repo}: the hub says: {first_line} (logged in? `hf auth login`)") from error
