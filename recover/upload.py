"""Sending files to the Hugging Face hub: as one commit, so that a repository holds all of them or none.

The token is the one huggingface_hub finds: HF_TOKEN, or what `hf auth login` stored. `HF_ENDPOINT` names another
server. Only files that are named are sent; nothing that lies on the hub already is deleted.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from rlkit.recover.hub import is_hub_id
from rlkit.recover.progress import Progress, Tell, silent

REFUSALS = {
    401: "the hub does not accept this token; set another HF_TOKEN, or run `hf auth login`",
    403: "this token may not write there; use one with write access, or another name",
    404: "the hub has no such owner, or this token may not see it; check the name",
}


def need_hub_id(repo: str) -> None:
    """Raise ValueError unless `repo` has the form owner/name."""
    if not is_hub_id(repo):
        raise ValueError(f"{repo!r} is no name of a hub repository; give owner/name")


def push(
    folder: Path, files: Sequence[str], repo: str, *, private: bool = False, message: str, tell: Tell = silent
) -> dict[str, Any]:
    """Send `files` of `folder` to the hub's model repository `repo`, which is made if need be; repo, commit and url.

    Raises ValueError for a name that is none and for `private` where the repository is public; OSError, with the
    remedy, if there is no token or if the hub refuses or does not answer.
    """
    need_hub_id(repo)
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils.tqdm import disable_progress_bars

    # isort: split
    import httpx2  # the HTTP client of huggingface_hub, so after it: its absence means that of the other

    disable_progress_bars()
    nbytes = sum((folder / name).stat().st_size for name in files)
    try:
        if huggingface_hub.get_token() is None:
            raise OSError("no token for the hub: set HF_TOKEN to one with write access, or run `hf auth login`")
        api = huggingface_hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)
        tell(Progress("push", 0, nbytes, repo))
        api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise ValueError(f"{repo} exists and is public, so nothing was sent; make it private on the hub first")
        added = [huggingface_hub.CommitOperationAdd(name, folder / name) for name in files]
        done = api.create_commit(repo, added, commit_message=message)
    except HFValidationError as error:
        raise ValueError(f"{repo} is no name of a hub repository ({_first_line(error)}); choose another") from error
    except JSONDecodeError as error:
        raise OSError(f"{repo} was not pushed: the hub's answer cannot be read; run it again later") from error
    except (httpx2.HTTPError, ConnectionError, RuntimeError) as error:  # RuntimeError: the uploader of large files
        raise OSError(f"{repo} was not pushed: {_refusal(error)}") from error
    tell(Progress("push", nbytes, nbytes, repo))
    return {"repo": repo, "commit": done.oid, "url": f"{api.endpoint}/{repo}"}


def _refusal(error: BaseException) -> str:
    from huggingface_hub.errors import HfHubHTTPError

    if type(error) is RuntimeError and error.__cause__ is not None:  # names the file only; the cause says what happened
        return _refusal(error.__cause__)
    if not isinstance(error, HfHubHTTPError):
        return f"{_first_line(error)}; check the connection and run it again"
    status = error.response.status_code
    return REFUSALS.get(status) or f"the hub answers {status} ({_first_line(error)}); run it again later"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
