"""The commands that show a bundle to others: `card` writes its model card, `push` sends it to the hub."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, Any

import typer

from rlkit.apps import console
from rlkit.export import card as cards
from rlkit.recover import upload
from rlkit.recover.atomic import sha256, write_json, write_text
from rlkit.recover.hub import is_hub_id
from rlkit.recover.source import read_json

MANIFEST, CARD = "rlkit.json", "README.md"

Bundle = Annotated[Path, typer.Argument(help="A bundle folder, made by rlkit export.")]
Private = Annotated[bool, typer.Option("--private", help="Only for you: make a new repository private.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check the files, say what would be sent, and stop.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")]


def card(
    bundle: Bundle,
    license: Annotated[str | None, typer.Option(help="The license of the weights, such as apache-2.0.")] = None,
    base_model: Annotated[str | None, typer.Option(help="The hub id of the original, such as Qwen/Qwen3-4B.")] = None,
    push_to: Annotated[str | None, typer.Option("--push", help="Then send the bundle to this hub repository.")] = None,
    private: Private = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Write the model card README.md of a bundle from its manifest; what is stated here is kept in the manifest.

    Example: rlkit card ./bundle --license apache-2.0 --base-model Qwen/Qwen3-4B
    """
    if push_to is not None:
        upload.need_hub_id(push_to)
    manifest = _stated(read_manifest(bundle), license, base_model)
    if not dry_run:
        text = cards.card(manifest)
        write_text(bundle / CARD, text)
        hashes = {**manifest["sha256"], CARD: sha256(bundle / CARD)}
        write_json(bundle / MANIFEST, {**manifest, "sha256": hashes})
    if push_to is not None:
        push(bundle, push_to, private=private, dry_run=dry_run, json=json)
    elif json:
        facts = {"license": cards.license_of(manifest), "base_model": cards.base_model(manifest)}
        console.emit_json({"schema_version": 1, "path": str(bundle / CARD), "dry_run": dry_run, **facts})
    elif dry_run:
        console.emit(cards.card(manifest).rstrip("\n"))
    else:
        console.emit(str(bundle / CARD))


def push(
    bundle: Bundle,
    repo: Annotated[str, typer.Argument(help="The hub repository, owner/name; made if it does not exist.")],
    private: Private = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Send a bundle to the Hugging Face hub, after checking every file against the manifest.

    The token is HF_TOKEN, or what `hf auth login` stored. Only files of the manifest are sent, all in one commit.

    Example: rlkit push ./bundle me/my-model-onnx --private
    """
    upload.need_hub_id(repo)
    manifest = read_manifest(bundle)
    files = files_to_send(bundle, manifest)
    nbytes = sum((bundle / name).stat().st_size for name in files)
    facts = {"schema_version": 1, "repo": repo, "files": files, "nbytes": nbytes, "dry_run": dry_run}
    if not json:
        _say_what(bundle, manifest, files, nbytes)
    if dry_run:
        sent: dict[str, Any] = {"commit": None, "url": None}
    else:
        with console.progress(quiet=json) as tell:
            name = f"{cards.source_name(manifest)} for {manifest['target']}"
            sent = upload.push(bundle, files, repo, private=private, message=f"Upload {name} with rlkit", tell=tell)
    if json:
        console.emit_json({**facts, **sent})
    elif not dry_run:
        console.emit(sent["url"])
    else:
        console.say(f"nothing is sent with --dry-run; without it: {repo}")


def read_manifest(bundle: Path) -> dict[str, Any]:
    """A bundle's manifest; FileNotFoundError or ValueError if this is no complete bundle of ours."""
    if not (bundle / MANIFEST).is_file():
        raise FileNotFoundError(f"{bundle} has no {MANIFEST}, so it is no rlkit bundle; make one with `rlkit export`")
    manifest = read_json(bundle / MANIFEST)
    needed = ("shape", "target", "accuracy_level", "tensors", "nbytes", "versions", "created", "sha256")
    if missing := [name for name in needed if name not in manifest]:
        raise ValueError(f"{bundle / MANIFEST} lacks {', '.join(missing)}; export the bundle again")
    return manifest


def files_to_send(bundle: Path, manifest: dict[str, Any]) -> list[str]:
    """The files of the manifest, checked against their SHA-256, and the manifest; never hidden ones.

    Raises ValueError for a file that is missing, changed, hidden, or outside the folder.
    """
    for name, expected in manifest["sha256"].items():
        path = bundle / name
        if not _is_plain(name) or not path.resolve().is_relative_to(bundle.resolve()):
            raise ValueError(f"{bundle / MANIFEST} names {name!r}, which is no file of a bundle; export it again")
        if not path.is_file():
            raise ValueError(f"{bundle} lacks {name}, so it is incomplete; export it again")
        if sha256(path) != expected:
            remedy = f"run `rlkit card {bundle}`" if name == CARD else "export it again"
            raise ValueError(f"{path} is not the file that {MANIFEST} states, so nothing was sent; {remedy}")
    return [*sorted(manifest["sha256"]), MANIFEST]


def _is_plain(name: str) -> bool:
    """Whether this is a relative path without hidden parts or tricks."""
    parts = PurePosixPath(name).parts
    return (
        bool(parts)
        and not PureWindowsPath(name).drive
        and not any(part.startswith(".") or part == "/" or "\\" in part for part in parts)
    )


def _stated(manifest: dict[str, Any], license: str | None, base_model: str | None) -> dict[str, Any]:
    """The manifest with what somebody states about the model."""
    if base_model is not None and not is_hub_id(base_model):
        raise ValueError(f"base model {base_model!r} is no hub id; give owner/name, such as Qwen/Qwen3-4B")
    stated = {"license": license and license.lower(), "base_model": base_model}
    found = manifest | {name: value for name, value in stated.items() if value is not None}
    if license is not None and cards.license_of(found) is None:
        raise ValueError(f"license {license!r} is no identifier of the hub; give one such as apache-2.0 or other")
    return found


def _say_what(bundle: Path, manifest: dict[str, Any], files: list[str], nbytes: int) -> None:
    console.say(f"{len(files)} files, {console.nbytes_text(nbytes)}: {', '.join(files)}")
    there = {file.relative_to(bundle).as_posix() for file in bundle.rglob("*") if file.is_file()}
    if left := sorted(there - set(files)):
        console.say(f"left out, as the manifest does not name them: {', '.join(left)}")
    reference = cards.source_reference(manifest)
    if PurePosixPath(reference).is_absolute() or PureWindowsPath(reference).is_absolute():
        console.say(f"note: {MANIFEST} says where the source lay on this machine, {reference}")
    if cards.license_of(manifest) is None:
        console.say(f"note: no license is stated; state one with: rlkit card {bundle} --license NAME")
