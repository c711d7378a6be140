"""Finds the file that `model_path` names. Nothing is fetched unless the configuration says so with `hf:`.

What is raised here reaches clients, so it names a file at most, never where it lies on the machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from cluster.errors import Forbidden, InvalidRequest, ModelUnavailable

#: The written forms that are not paths.
KINDS = ("package", "hf")


def resolve_weights(model_path: str | None, *, in_folder: bool | None = False) -> str:
    """The local path of a model's file: `package:name/file`, `hf:owner/repo/file`, or a path.

    With `in_folder` it is a folder, and `hf:owner/repo` the whole repository; None is whichever of the two is there.
    What is named by `hf:` is downloaded once, with the hub library's own progress bar. Blocks. Raises
    `ModelUnavailable`.
    """
    if model_path is None:
        return ""
    kind, _, rest = model_path.partition(":")
    if kind == "package":
        path = _in_package(rest)
    elif kind == "hf":
        is_whole = rest.count("/") == 1 if in_folder is None else in_folder
        path = _folder_from_hub(rest) if is_whole else _from_hub(rest)
    else:
        path = Path(model_path).expanduser()
    is_there = path.exists() if in_folder is None else path.is_dir() if in_folder else path.is_file()
    if not is_there:
        shown = model_path if kind in KINDS else path.name
        raise ModelUnavailable(f"there is no model {'folder' if in_folder else 'file'} {shown!r} where model_path says")
    return str(path)


async def find_weights(model_path: str | None, *, in_folder: bool | None = False) -> str:
    """`resolve_weights` on an event loop: in a thread where it may take longer than a look at the disk."""
    if (model_path or "").startswith("hf:"):
        return await asyncio.to_thread(resolve_weights, model_path, in_folder=in_folder)
    return resolve_weights(model_path, in_folder=in_folder)


def weights_at_hand(model_path: str | None) -> Path | None:
    """Where a model's file or folder lies already; None if it is not there (yet). Fetches nothing. Blocks."""
    kind, _, rest = (model_path or "").partition(":")
    if kind == "hf":
        from huggingface_hub import try_to_load_from_cache

        parts = rest.split("/")
        # Of a whole repository, the file that every model's folder has.
        file = "/".join(parts[2:]) or "config.json"
        cached = try_to_load_from_cache("/".join(parts[:2]), file) if len(parts) > 1 else None
        if not isinstance(cached, str):
            return None
        return Path(cached) if len(parts) > 2 else Path(cached).parent
    try:
        path = _in_package(rest) if kind == "package" else Path(model_path or "").expanduser()
    except ModelUnavailable:
        return None
    return path if model_path and path.exists() else None


async def prefetch(model_path: str | None) -> None:
    """Have a model's file read into the page cache, if it is here already. Neither waits for that nor fails."""
    with contextlib.suppress(OSError):
        await asyncio.to_thread(_prefetch, model_path)


def _prefetch(model_path: str | None) -> None:
    path = weights_at_hand(model_path)
    files = [path] if path is not None and path.is_file() else sorted(path.iterdir()) if path is not None else []
    for each in files:
        if each.is_file():
            with each.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def check_runtime_path(model_path: str | None, roots: Iterable[str]) -> None:
    """Whether a model that is registered at run time may use this file. Blocks for a look at the disk; fetches nothing.

    `roots` are folders, `package:NAME`, `hf:OWNER` or `hf:OWNER/REPO`. A path must be absolute, and lie under one of
    the folders on this machine when all links are followed. Raises `InvalidRequest` or `Forbidden`.
    """
    if model_path is None:
        return
    kind, _, rest = model_path.partition(":")
    written = rest if kind in KINDS else model_path
    if ".." in written.split("/") or (kind in KINDS and "" in written.split("/")):
        raise InvalidRequest("model_path must not contain '..' or empty parts", param="model_path", status=422)
    if kind in KINDS:
        allowed = any(_is_below(model_path, root) for root in roots)
    elif not model_path.startswith(("/", "~")):
        raise InvalidRequest("model_path must be absolute", param="model_path", status=422)
    else:
        allowed = any(_is_inside(model_path, root) for root in roots if root.partition(":")[0] not in KINDS)
    if not allowed:
        raise Forbidden(f"model_path {model_path!r} is not below the pool's model_roots", param="model_path")


def _is_below(name: str, root: str) -> bool:
    """Whether `package:a/b` or `hf:a/b/c` is `root`, or begins with it and goes on."""
    return name == root or name.startswith(root.rstrip("/") + "/")


def _is_inside(path: str, folder: str) -> bool:
    try:
        return Path(path).expanduser().resolve().is_relative_to(Path(folder).expanduser().resolve())
    except (OSError, RuntimeError, ValueError):
        return False  # A circle of links, a home that nobody has, characters that no path may have.


def _in_package(name: str) -> Path:
    package, _, file = name.partition("/")
    # find_spec runs nothing of the package it looks for (some with weights import a whole framework), but it runs the
    # parents of a dotted name.
    if not package.isidentifier():
        raise ModelUnavailable(f"package:{package} must be the name of one package, without dots")
    if file.startswith("/") or ".." in file.split("/"):
        raise ModelUnavailable(f"package:{name} must name a file inside the package")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModelUnavailable(f"the Python package {package!r}, which carries the model, is not installed")
    return Path(spec.submodule_search_locations[0]) / file


def _from_hub(name: str) -> Path:
    from huggingface_hub import hf_hub_download

    parts = name.split("/")
    if len(parts) < 3:
        raise ModelUnavailable(f"hf:{name} must name owner, repository and file: hf:owner/repo/file.gguf")
    return _fetched(name, lambda: hf_hub_download("/".join(parts[:2]), "/".join(parts[2:])))


def _folder_from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    if len(name.split("/")) != 2:
        raise ModelUnavailable(f"hf:{name} must name owner and repository: hf:owner/repo")
    return _fetched(name, lambda: snapshot_download(name))


def _fetched(name: str, fetch: Callable[[], str]) -> Path:
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(fetch())
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelUnavailable(f"hf:{name} could not be fetched: {type(error).__name__}") from None
