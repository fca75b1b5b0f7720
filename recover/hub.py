"""Models of the Hugging Face hub, fetched only when the user has named one: weights as safetensors, config, tokenizer.

Nothing of a repository is ever run: neither its code (no trust_remote_code) nor pickled weights. `HF_ENDPOINT` names
another server, `HF_TOKEN` opens gated models. An interrupted download continues where it stopped; a folder without
`.part` in its name is complete.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlkit.recover import atomic
from rlkit.recover.cache import cache_folder, megabytes, nbytes_below
from rlkit.recover.progress import Progress, Tell, silent

WANTED = ["*.safetensors", "*.json", "tokenizer*", "vocab.*", "merges.txt", "*.jinja", "LICENSE*"]
UNWANTED = ["*/*", "consolidated*"]  # subfolders hold other formats; consolidated: the same weights once more
POLL_SECONDS = 0.5


def is_hub_id(reference: str) -> bool:
    """Whether `reference` has the form owner/name."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", reference) is not None


def folder_of(hub_id: str) -> Path:
    """Where the model `hub_id` is kept."""
    return cache_folder() / "hub" / hub_id.replace("/", "--")


def cached(hub_id: str) -> Path | None:
    """The kept folder of a hub model, or None."""
    folder = folder_of(hub_id)
    return folder if (folder / "origin.json").is_file() else None


def nbytes(hub_id: str) -> int:
    """What a download of `hub_id` would transfer, asked from the hub."""
    return sum(int(file.file_size) for file in _listing(hub_id, folder_of(hub_id)))


def fetch(hub_id: str, tell: Tell = silent, *, force: bool = False) -> Path:
    """The folder of a hub model, downloaded if it is not kept already or if `force`.

    Raises OSError if the hub does not answer or refuses, naming the remedy.
    """
    folder = folder_of(hub_id)
    if cached(hub_id) is not None and not force:
        return folder
    part = folder.with_name(f"{folder.name}.part")
    part.mkdir(parents=True, exist_ok=True)
    files = _listing(hub_id, part)
    if not any(file.filename == "config.json" for file in files):
        raise ValueError(f"{hub_id} has no config.json, so it is no transformers model; name another repository")
    total = sum(int(file.file_size) for file in files)
    atomic.need_space(part, total - nbytes_below(part))
    with _watching(part, total, f"download {hub_id}", tell):
        _snapshot(hub_id, part, revision=files[0].commit_hash)
    shutil.rmtree(part / ".cache", ignore_errors=True)
    atomic.write_json(part / "origin.json", {"hub": hub_id, "commit": files[0].commit_hash, "nbytes": total})
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(part, folder)
    return folder


def _listing(hub_id: str, folder: Path) -> list[Any]:
    """The files wanted of `hub_id`, each with filename, file_size and commit_hash."""
    files: list[Any] = list(_snapshot(hub_id, folder, dry_run=True))
    return files


def _snapshot(hub_id: str, folder: Path, *, revision: str | None = None, dry_run: bool = False) -> Any:
    import huggingface_hub
    from huggingface_hub.errors import DryRunError
    from huggingface_hub.utils.tqdm import disable_progress_bars

    # isort: split
    import httpx2  # the HTTP client of huggingface_hub, so after it: its absence means that of the other

    disable_progress_bars()
    try:
        return huggingface_hub.snapshot_download(
            hub_id,
            revision=revision,
            local_dir=folder,
            allow_patterns=WANTED,
            ignore_patterns=UNWANTED,
            endpoint=os.environ.get("HF_ENDPOINT") or None,
            dry_run=dry_run,
        )
    except DryRunError as error:  # its cause is what the server said, or that it said nothing
        raise OSError(_refusal(hub_id, error.__cause__ or error)) from error
    except (httpx2.HTTPError, ConnectionError) as error:
        raise OSError(_refusal(hub_id, error)) from error


def _refusal(hub_id: str, error: BaseException) -> str:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return f"{hub_id} is gated: accept its terms on the hub, set HF_TOKEN, and run it again"
    if isinstance(error, RepositoryNotFoundError):
        return f"the hub has no model {hub_id}, or it is private; check the name, or set HF_TOKEN"
    why = (str(error) or type(error).__name__).splitlines()[0]
    return f"{hub_id} cannot be downloaded: {why}; check the connection and run it again"


@contextlib.contextmanager
def _watching(folder: Path, total: int, stage: str, tell: Tell) -> Iterator[None]:
    """While open, a thread tells how many bytes of `folder` have arrived: the hub's client blocks meanwhile."""
    stop = threading.Event()

    def say() -> None:
        done = min(nbytes_below(folder), total)
        tell(Progress(stage, done, total, megabytes(done, total)))

    def watch() -> None:
        while not stop.wait(POLL_SECONDS):
            say()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        say()
