"""The header of a GGUF file on the model hub, without the rest of it."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from app.cli.output import Failure, Misuse
from deployments.engines.llama_cpp.gguf import GgufCutOffError, GgufError, read_header

MIB = 1 << 20
#: How much of a file's beginning is fetched, one after the other until the header is whole. Vocabularies are long.
PARTS = (16 * MIB, 64 * MIB, 256 * MIB)


@contextlib.contextmanager
def fetched_header(name: str, client: httpx.Client | None = None) -> Iterator[Path]:
    """A file that has the beginning of `owner/repo/file.gguf` and its length, so that its header can be read.

    Raises `Failure` where the hub does not give it.
    """
    parts = name.split("/")
    if len(parts) < 3:
        raise Misuse(f"hf:{name} must name owner, repository and file: hf:owner/repo/file.gguf")
    with tempfile.TemporaryDirectory(prefix="slotpool-") as folder:
        path = Path(folder, parts[-1])
        with client or _client() as http:
            for length in PARTS:
                total = _fetch(http, parts, length, path)
                if length >= total or not _ends_within_header(path):
                    break
        os.truncate(path, total)
        yield path


def _fetch(http: httpx.Client, parts: list[str], length: int, path: Path) -> int:
    """Write the first bytes of a file of the hub; its whole length."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url("/".join(parts[:2]), "/".join(parts[2:]))
    headers: dict[str, Any] = {**build_hf_headers(), "Range": f"bytes=0-{length - 1}"}
    try:
        with http.stream("GET", url, headers=headers) as response, path.open("wb") as file:
            response.raise_for_status()
            total = int(response.headers.get("content-range", "").rpartition("/")[2] or 0)
            got = 0
            for chunk in response.iter_bytes():
                got += file.write(chunk[: length - got])
                if got >= length:
                    break
            return max(total, got)
    except (httpx.HTTPError, ValueError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise Failure(f"hf:{'/'.join(parts)} could not be read: {reason}") from None


def _ends_within_header(path: Path) -> bool:
    try:
        read_header(path)
    except GgufCutOffError:
        return True
    except GgufError:
        return False
    return False


def _client() -> httpx.Client:
    return httpx.Client(follow_redirects=True, timeout=httpx.Timeout(60, connect=10))
