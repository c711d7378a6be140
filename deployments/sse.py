"""Server-sent events as bytes."""

from __future__ import annotations

import json

from cluster.errors import PoolError

DONE = b"data: [DONE]\n\n"


def comment(text: str) -> bytes:
    """A line that clients ignore; it keeps a waiting connection alive and tells a person why it waits."""
    return f": {text}\n\n".encode()


def is_comment(chunk: bytes) -> bool:
    """Whether a part of a stream is one comment and nothing else."""
    return chunk.startswith(b":") and chunk.find(b"\n\n") == len(chunk) - 2


def error_event(error: PoolError) -> bytes:
    """The end of a stream that has failed after its status was sent. Every OpenAI client raises on it."""
    return b"data: " + json.dumps(error.body(), separators=(",", ":")).encode() + b"\n\n"
