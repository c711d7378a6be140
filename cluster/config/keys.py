"""API keys: who may ask, and for what. The configuration holds their SHA-256 digests only.

A key may be written as `env:NAME` or `sha256:HEX` anywhere, and in clear in a file of the pool's own. In a Serve
application's `args` a clear key is refused, since Serve's REST API and dashboard show those. `hashed` turns all of
them into digests before the schema sees them, so that no clear key can reach an error, a log, or a process that is
given the configuration. No message of this module may contain what stands in the place of a key.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

#: Who asks without a key. No key may have this name.
ANONYMOUS = "anonymous"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_ENVIRONMENT = re.compile(r"env:([A-Za-z_][A-Za-z0-9_]*)")
_CLASSES = {"high": 1, "medium": 2, "low": 3}
_HOW = (
    "a key in clear would be shown by Serve's REST API and dashboard: write env:NAME or sha256:HEX "
    "(printf %s KEY | sha256sum), or keep the configuration in a file of its own (args: {config: FILE})"
)


class Budget(BaseModel):
    """What a key may be used for on one day (UTC). `cost` is in the currency of the models' `price`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    #: Requests.
    requests: Annotated[int, Field(ge=0)] | None = None
    #: Tokens, of prompts and answers.
    tokens: Annotated[int, Field(ge=0)] | None = None
    #: What the tokens cost.
    cost: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None


class ApiKey(BaseModel):
    """One key. A text alone is its `key`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    #: The principal of its requests, in metrics and on the status page. Unset: made of the digest.
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.@:/ -]{1,64}$")]
    #: `env:NAME`, `sha256:HEX`, or the key itself where the file is the pool's own.
    key: Annotated[str, Field(pattern=rf"^{_DIGEST.pattern}$", repr=False)]
    #: Ids, aliases and public names that it may use; none = all.
    models: tuple[str, ...] = ()
    #: The best class that its requests get, whatever they ask for.
    max_priority: Literal["high", "medium", "low"] = "high"
    #: Requests at a time, for each ingress.
    max_concurrent: Annotated[int, Field(ge=1)] | None = None
    #: Requests in a minute, for each ingress.
    requests_per_minute: Annotated[int, Field(ge=1)] | None = None
    #: What it may be used for on one day, at all ingresses together.
    budget: Budget | None = None

    @property
    def is_limited(self) -> bool:
        """Whether anything is counted of what the key is used for."""
        return not (self.max_concurrent is None and self.requests_per_minute is None and self.budget is None)


class Caller(NamedTuple):
    """Who sent a request, and what that allows. The defaults are those of a caller that is trusted with everything.

    `may_pin`: its requests may keep a model loaded without end.
    """

    principal: str = ANONYMOUS
    may_pin: bool = True
    models: tuple[str, ...] = ()
    best_priority: int = 1

    @classmethod
    def of(cls, key: ApiKey, *, is_admin: bool) -> Caller:
        """The caller that has shown this key."""
        return cls(key.name, is_admin, key.models, _CLASSES[key.max_priority])

    def keep_alive_s(self, wanted: float | None, longest_s: float) -> float | None:
        """How long a model stays after a request that asks for `wanted`; -1 is a pin."""
        if wanted is None or self.may_pin:
            return wanted
        return longest_s if wanted < 0 else min(wanted, longest_s)


def hashed(keys: Any, field: str, environ: Mapping[str, str], *, may_be_clear: bool) -> Any:
    """`keys` as the configuration has them under `field`, as mappings with a name and a digest.

    What is neither text nor a mapping is left for the schema to refuse. Raises `ValueError` with the path of the key.
    """
    if not isinstance(keys, list | tuple):
        return keys
    prefix = "admin" if field == "admin_keys" else "key"
    return [_entry(each, f"{field}.{at}", prefix, environ, may_be_clear) for at, each in enumerate(keys)]


def _entry(entry: Any, path: str, prefix: str, environ: Mapping[str, str], may_be_clear: bool) -> Any:
    entry = {"key": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, Mapping) or not isinstance(entry.get("key"), str):
        return entry
    digest = _digest(entry["key"].strip(), path, environ, may_be_clear)
    return {"name": f"{prefix}-{digest[7:15]}", **entry, "key": digest}


def _digest(text: str, path: str, environ: Mapping[str, str], may_be_clear: bool) -> str:
    if text.lower().startswith("sha256:"):
        if not _DIGEST.fullmatch(text.lower()):
            raise ValueError(f"{path}: sha256: must be followed by 64 hexadecimal digits")
        return text.lower()
    if text.startswith("env:"):
        variable = _ENVIRONMENT.fullmatch(text)
        if variable is None:
            raise ValueError(f"{path}: env: must be followed by the name of an environment variable")
        text = environ.get(variable[1], "").strip()
        if not text:
            raise ValueError(f"{path}: the environment variable {variable[1]} is not set")
    elif not may_be_clear:
        raise ValueError(f"{path}: {_HOW}")
    if not text:
        raise ValueError(f"{path}: the key is empty")
    return digest_of(text.encode())


def digest_of(key: bytes) -> str:
    """The form in which the configuration holds a key."""
    return f"sha256:{hashlib.sha256(key).hexdigest()}"


def find_key(given: Iterable[bytes], known: Iterable[ApiKey]) -> ApiKey | None:
    """The known key that is among the given ones. The time that it takes tells nothing of the known ones."""
    digests = [digest_of(key) for key in given]
    found = None
    for key in known:
        for digest in digests:
            if secrets.compare_digest(digest, key.key):
                found = key
    return found


def check_keys(api_keys: Iterable[ApiKey], admin_keys: Iterable[ApiKey]) -> None:
    """Raise `ValueError` where two keys share a name or are the same, or where a name is the one of no key."""
    names: set[str] = set()
    digests: set[str] = set()
    for field, keys in (("api_keys", api_keys), ("admin_keys", admin_keys)):
        for at, key in enumerate(keys):
            if key.key in digests:
                raise ValueError(f"{field}.{at}: this key stands there twice")
            if key.name in names or key.name == ANONYMOUS:
                raise ValueError(f"{field}.{at}.name: {key.name!r} is taken")
            names.add(key.name)
            digests.add(key.key)
