"""Finds the file that `model_path` names. Nothing is fetched unless the configuration says so with `hf:`."""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path

from cluster.errors import ModelUnavailable


def resolve_weights(model_path: str | None) -> str:
    """The local path of a model's file: `package:name/file`, `hf:owner/repo/file`, or a path.

    An `hf:` file is downloaded once, with the hub library's own progress bar. Blocks. Raises `ModelUnavailable`.
    """
    if model_path is None:
        return ""
    kind, _, rest = model_path.partition(":")
    if kind == "package":
        path = _in_package(rest)
    elif kind == "hf":
        path = _from_hub(rest)
    else:
        path = Path(model_path).expanduser()
    if not path.is_file():
        raise ModelUnavailable(f"no model file at model_path {model_path!r}")
    return str(path)


async def find_weights(model_path: str | None) -> str:
    """`resolve_weights` on an event loop: in a thread where it may take longer than a look at the disk."""
    if (model_path or "").startswith("hf:"):
        return await asyncio.to_thread(resolve_weights, model_path)
    return resolve_weights(model_path)


def weights_at_hand(model_path: str | None) -> Path | None:
    """Where a model's file or folder lies already; None if it is not there (yet). Fetches nothing. Blocks."""
    kind, _, rest = (model_path or "").partition(":")
    if kind == "hf":
        from huggingface_hub import try_to_load_from_cache

        parts = rest.split("/")
        cached = try_to_load_from_cache("/".join(parts[:2]), "/".join(parts[2:])) if len(parts) > 2 else None
        return Path(cached) if isinstance(cached, str) else None
    try:
        path = _in_package(rest) if kind == "package" else Path(model_path or "").expanduser()
    except ModelUnavailable:
        return None
    return path if model_path and path.exists() else None


def _in_package(name: str) -> Path:
    package, _, file = name.partition("/")
    # find_spec does not run the package: some weight packages import a whole framework.
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModelUnavailable(f"the Python package {package!r}, which carries the model, is not installed")
    return Path(spec.submodule_search_locations[0]) / file


def _from_hub(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    parts = name.split("/")
    if len(parts) < 3:
        raise ModelUnavailable(f"hf:{name} must name owner, repository and file: hf:owner/repo/file.gguf")
    try:
        return Path(hf_hub_download("/".join(parts[:2]), "/".join(parts[2:])))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelUnavailable(f"hf:{name} could not be fetched: {type(error).__name__}") from None
