"""Bodies: bounded while they come in, the same value whichever parser reads them, and other work goes on meanwhile."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

from app import body as bodies
from app.body import FEW_COMMAS, INLINE_BYTES, parse_json, read_json
from cluster import errors

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def incoming(*parts: bytes, headers: dict[str, str] | None = None) -> tuple[Request, list[bytes]]:
    """A request whose body comes in parts, and the parts that nobody has taken yet."""
    left = list(parts)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    raw = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    return Request({"type": "http", "method": "POST", "path": "/", "headers": raw}, receive), left


@given(VALUES)
def test_both_parsers_agree(value):
    assert bodies._PythonDecoder().decode(json.dumps(value)) == value


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
async def test_a_large_body_is_read_whatever_its_encoding(encoding):
    value = {"prompt": list(range(INLINE_BYTES // 4)), "text": "ä" * 10}
    assert len(value["prompt"]) > FEW_COMMAS
    text = json.dumps(value, ensure_ascii=False).encode(encoding)
    request, _ = incoming(text[:1000], text[1000:])
    assert await read_json(request, 32) == value


@pytest.mark.parametrize("filler", [b" " * INLINE_BYTES, b"1," * INLINE_BYTES])
@pytest.mark.parametrize(("text", "reason"), [(b"[%s", "not JSON"), (b"[%s" + b"[" * 100_000, "nested too deeply")])
async def test_a_large_body_that_is_no_json(filler, text, reason):
    request, _ = incoming(text % filler)
    with pytest.raises(errors.InvalidRequest, match=reason):
        await read_json(request, 32)


async def test_the_limit_holds_while_the_body_comes_in():
    request, left = incoming(*[b"x" * 2**19] * 8)
    with pytest.raises(errors.RequestTooLarge):
        await read_json(request, 1)
    assert len(left) == 5
    request, left = incoming(b"{}", headers={"content-length": str(2**21)})
    with pytest.raises(errors.RequestTooLarge):
        await read_json(request, 1)
    assert len(left) == 1


async def test_the_event_loop_has_its_turns_while_a_large_body_is_parsed():
    request, _ = incoming(b"[" + b"123," * 500_000 + b"1]")
    reading = asyncio.create_task(read_json(request, 32))
    turns = 0
    while not reading.done():
        await asyncio.sleep(0.001)
        turns += 1
    assert len(await reading) == 500_001
    # The C parser holds the interpreter for all of it: a turn or two.
    assert turns > 10


def test_a_small_body():
    assert parse_json(bytearray(b'{"a": 1}')) == {"a": 1}
    for bad in (b"", b"{", b"\xff\xfe{"):
        with pytest.raises(errors.InvalidRequest):
            parse_json(bytearray(bad))
