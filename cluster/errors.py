"""The error tree: every refusal that a client can see, with its status, code and retry hint.

    PoolError                        500 INTERNAL_ERROR
    ├── InvalidRequest               400 INVALID_REQUEST (422 where a schema was broken)
    │   ├── ContextLengthExceeded    400 context_length_exceeded
    │   └── UnsupportedParameter     400 unsupported_parameter
    ├── ModelRequired                400 MODEL_REQUIRED
    ├── ModelNotFound                404 MODEL_NOT_FOUND
    ├── ModelNotLoaded               503 model_not_loaded
    ├── FormatNotSupported           400 FORMAT_NOT_SUPPORTED (+ preferred_formats)
    ├── MemoryBudgetExceeded         400 MEMORY_BUDGET_EXCEEDED
    ├── Unauthorized                 401 UNAUTHORIZED
    ├── BudgetExceeded               402 budget_exceeded
    ├── Forbidden                    403 FORBIDDEN
    ├── RequestTooLarge              413 REQUEST_TOO_LARGE
    ├── QueueFull                    429 GPU_OVERLOADED
    ├── RateLimited                  429 RATE_LIMITED
    ├── ModelUnavailable             503 MODEL_UNAVAILABLE
    ├── BackendUnavailable           503 BACKEND_UNAVAILABLE
    │   └── ReplicaGone              503, internal: the gateway retries on another replica before the first byte
    └── BackendTimeout               504 BACKEND_TIMEOUT (+ phase)

The module renders nothing but the one canonical body; a route family that needs another shape adapts it. It
must never put a traceback, a key or a path of the machine into a message.
"""

from __future__ import annotations

from typing import Any


class PoolError(Exception):
    """A refusal or failure with the contract's status and code.

    `message` is for a person; `param` names the request field at fault; `retry_after` is in seconds; `extras`
    are further members of the error object. Instances pickle, since they cross process borders.
    """

    status = 500
    code = "INTERNAL_ERROR"
    type = "server_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status: int | None = None,
        retry_after: float | None = None,
        **extras: Any,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or type(self).code
        self.status = status or type(self).status
        self.retry_after = retry_after
        self.extras = extras

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.message, self.param, self.code, self.status, self.retry_after, self.extras))

    def body(self) -> dict[str, Any]:
        """The contract's body: `{"error": {message, type, param, code, …extras}}`."""
        error: dict[str, Any] = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        error.update(self.extras)
        if self.retry_after is not None:
            error["retry_after"] = self.retry_after
        return {"error": error}


def _rebuild(
    kind: type[PoolError],
    message: str,
    param: str | None,
    code: str,
    status: int,
    retry_after: float | None,
    extras: dict[str, Any],
) -> PoolError:
    return kind(message, param=param, code=code, status=status, retry_after=retry_after, **extras)


class InvalidRequest(PoolError):
    status, code, type = 400, "INVALID_REQUEST", "invalid_request_error"


class ContextLengthExceeded(InvalidRequest):
    """The prompt, with the tokens asked for, does not fit into the model's context. Raised before the engine runs."""

    code = "context_length_exceeded"


class UnsupportedParameter(InvalidRequest):
    """The engine cannot honour a field that would change the answer; `param` names it."""

    code = "unsupported_parameter"


class ModelRequired(InvalidRequest):
    code = "MODEL_REQUIRED"


class ModelNotFound(InvalidRequest):
    status, code = 404, "MODEL_NOT_FOUND"


class ModelNotLoaded(PoolError):
    """A model with `activation: manual` that nobody has loaded."""

    status, code = 503, "model_not_loaded"


class FormatNotSupported(InvalidRequest):
    """The model's backend does not read weights of its format; `preferred_formats` in the body says which it does."""

    code = "FORMAT_NOT_SUPPORTED"


class MemoryBudgetExceeded(InvalidRequest):
    """The model alone is larger than the pool could ever give it; nothing is evicted for it."""

    code = "MEMORY_BUDGET_EXCEEDED"


class Unauthorized(PoolError):
    status, code, type = 401, "UNAUTHORIZED", "authentication_error"


class BudgetExceeded(PoolError):
    """A key has used what it may on one day; `limit` in the body says of what."""

    status, code, type = 402, "budget_exceeded", "insufficient_quota"


class Forbidden(PoolError):
    status, code, type = 403, "FORBIDDEN", "permission_error"


class RequestTooLarge(InvalidRequest):
    status, code = 413, "REQUEST_TOO_LARGE"


class QueueFull(PoolError):
    status, code, type = 429, "GPU_OVERLOADED", "rate_limit_error"


class RateLimited(PoolError):
    status, code, type = 429, "RATE_LIMITED", "rate_limit_error"


class ModelUnavailable(PoolError):
    """The model failed to start, or waits out its load back-off."""

    status, code = 503, "MODEL_UNAVAILABLE"


class BackendUnavailable(PoolError):
    status, code = 503, "BACKEND_UNAVAILABLE"


class ReplicaGone(BackendUnavailable):
    """The leased replica vanished before it answered; never shown to a client as long as a retry is left."""


class BackendTimeout(PoolError):
    """A deadline passed; `phase` in the body is queued, loading or running."""

    status, code, type = 504, "BACKEND_TIMEOUT", "timeout_error"
