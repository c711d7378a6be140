"""What a server's refusals and failures mean for the pool's clients (CONTRACT section 6). No error holds a key."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import httpx

from cluster.errors import (
    BackendTimeout,
    BackendUnavailable,
    ContextLengthExceeded,
    InvalidRequest,
    PoolError,
    RateLimited,
    ReplicaGone,
)

#: How much of a refusal's body is read, and how much of its message is passed on, in characters.
MAX_REFUSAL, MAX_MESSAGE = 65_536, 500
#: What servers call a prompt that is too long.
TOO_LONG = ("exceed_context_size_error", "context_length_exceeded", "maximum context length")


@dataclass(frozen=True, slots=True)
class Blame:
    """Who a failure is told of: `name` is what messages call the server, `key` what none of them may hold.

    Where the server `is_ours`, what it finds wrong with a request is the client's mistake, and no failure of a
    stranger's. One that `is_retried` may be asked again by the gateway when it was lost before its first byte.
    """

    name: str
    key: str | None = None
    is_ours: bool = False
    is_retried: bool = True

    async def refusal(self, answer: httpx.Response) -> PoolError:
        """What a status other than 200 means, with the server's own words."""
        body = b""
        async for part in answer.aiter_raw():
            body += part
            if len(body) > MAX_REFUSAL:
                break
        status = answer.status_code
        told = _told(body)
        words = self._clean(told.text)
        message = f"{self.name} answered {status}: {words}"
        if status in (401, 403):
            return BackendUnavailable(message, status=502, code="upstream_authentication_failure")
        if status == 429:
            return RateLimited(message, code="upstream_rate_limit", retry_after=_retry_after(answer))
        if status in (408, 504):
            return BackendTimeout(message, code="upstream_timeout", phase="running")
        if 400 <= status < 500 and told.is_too_long:
            # Whoever's server it is: agents shorten their conversation when they hear this, and retry anything else.
            return ContextLengthExceeded(words, param="messages")
        if 400 <= status < 500 and self.is_ours:
            return InvalidRequest(words, param=told.param)
        if 400 <= status < 500:
            return BackendUnavailable(message, status=502, code="upstream_invalid_request")
        return BackendUnavailable(message, status=502, code="upstream_server_error")

    def unreadable(self, why: str) -> PoolError:
        """It sent something that is no answer."""
        message = f"{self.name} cannot be understood: {self._clean(why)}"
        return BackendUnavailable(message, status=502, code="upstream_response_parse_failure")

    def silent(self) -> PoolError:
        """It said nothing for longer than it may."""
        return BackendTimeout(f"{self.name} did not answer in time", code="upstream_timeout", phase="running")

    def unreachable(self) -> PoolError:
        """There is no way to it."""
        return self._gone(f"{self.name} cannot be reached")

    def lost(self) -> PoolError:
        """The way to it has ended before its answer has."""
        return self._gone(f"the connection to {self.name} was lost")

    def _gone(self, message: str) -> PoolError:
        kind = ReplicaGone if self.is_retried else BackendUnavailable
        return kind(message, status=502, code="upstream_connection_error")

    def _clean(self, text: str) -> str:
        return text if self.key is None else text.replace(self.key, "***")


@dataclass(frozen=True, slots=True)
class _Told:
    """What a server's error body says."""

    text: str
    param: str | None = None
    is_too_long: bool = False


def _told(body: bytes) -> _Told:
    """The message in an error body of whatever shape."""
    try:
        error: Any = json.loads(body)
    except (ValueError, RecursionError):
        error = None
    param, kinds = None, []
    for key in ("error", "detail", "message"):
        if isinstance(error, dict):
            param = error.get("param", param)
            kinds += [str(error.get("type")), str(error.get("code"))]
            error = error.get(key, error)
    text = error if isinstance(error, str) else body.decode(errors="replace")
    is_too_long = any(mark in each for mark in TOO_LONG for each in (text, *kinds))
    text = text.strip()[:MAX_MESSAGE] or "nothing more"
    return _Told(text, param if isinstance(param, str) else None, is_too_long)


def _retry_after(answer: httpx.Response) -> float:
    value = answer.headers.get("retry-after", "")
    return max(1.0, float(value)) if value.isdigit() else 1.0
