"""Reads the JSON body of a request: bounded while it comes in, and parsed without stopping the streams of others.

The C parser of the standard library never lets go of the interpreter, so megabytes of token ids stop every stream of
the process, in whichever thread they are parsed. So a large body is parsed in a thread, and one of many values there by
the library's parser in Python, which takes many times as long and lets the event loop have its turns
(`docs/measurements.md`).
"""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from json.scanner import py_make_scanner  # type: ignore[attr-defined]  # the stub names the C one only
from typing import Any

from fastapi import Request

from cluster import errors

#: A body up to so many bytes takes a millisecond or two at most, less than the way to a thread and back is worth.
INLINE_BYTES = 256 * 1024
#: So many commas mean no more values than the C parser reads in a few milliseconds.
FEW_COMMAS = 20_000

#: Of its own: bodies that take seconds must not keep the process's other threads from their work.
_threads = ThreadPoolExecutor(4, thread_name_prefix="slotpool-body")


class _PythonDecoder(json.JSONDecoder):
    """The standard library's decoder with its scanner in Python; only strings are read by C code."""

    def __init__(self) -> None:
        super().__init__()
        self.scan_once = py_make_scanner(self)


async def read_json(request: Request, max_mb: float) -> Any:
    """The JSON body. Raises `RequestTooLarge` as soon as it is known to be, `InvalidRequest` when it is not JSON."""
    return await parse(await read_body(request, max_mb))


async def read_body(request: Request, max_mb: float) -> bytearray:
    """The body as it is. Raises `RequestTooLarge` as soon as it is known to be."""
    limit = int(max_mb * 2**20)
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise errors.RequestTooLarge(f"the body is larger than {max_mb:g} MiB")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise errors.RequestTooLarge(f"the body is larger than {max_mb:g} MiB")
    return body


async def parse(body: bytearray) -> Any:
    """The value of a whole JSON text, without stopping the event loop. Raises `InvalidRequest`."""
    if len(body) <= INLINE_BYTES:
        return parse_json(body)
    return await asyncio.get_running_loop().run_in_executor(_threads, parse_json, body)


def parse_json(body: bytearray) -> Any:
    """The value of a whole JSON text. Raises `InvalidRequest`."""
    try:
        if len(body) <= INLINE_BYTES or body.count(b",") <= FEW_COMMAS:
            return json.loads(body)
        return _PythonDecoder().decode(body.decode(json.detect_encoding(body), "surrogatepass"))
    except ValueError as error:
        raise errors.InvalidRequest(f"the body is not JSON: {error}") from None
    except RecursionError:
        raise errors.InvalidRequest("the body is nested too deeply") from None
