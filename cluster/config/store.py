"""Where a pool keeps what must survive: stored responses the pool itself, conversations the engines that had them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_validator

DAY_S = 86_400.0


class StoreConfig(BaseModel):
    """The pool's store. Without `url` it is a SQLite file, which all ingress replicas of a machine share."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    #: SQLAlchemy's, for a database that several machines reach: `postgresql+psycopg://user@host/name`. `env:NAME` where
    #: there is a password in it: Ray shows the configuration to everybody who asks.
    url: str | None = None
    #: Where the SQLite file lies. Unset: `slotpool` in `$XDG_STATE_HOME` (`~/.local/state`).
    folder: str | None = None
    #: How long a response is kept, in seconds.
    keep_s: Annotated[float, Field(gt=0)] = 30 * DAY_S
    #: How much of all of them together is kept, in MiB: the oldest go first.
    max_mb: Annotated[float, Field(gt=0)] = 1024.0

    @field_validator("url")
    @classmethod
    def _no_password(cls, url: str | None) -> str | None:
        if url is None or re.fullmatch(r"env:\w+", url):
            return url
        if not re.match(r"[a-z0-9]+(\+[a-z0-9]+)?://", url):
            raise ValueError("must be a SQLAlchemy URL such as postgresql+psycopg://user@host/name, or env:NAME")
        if re.match(r"[^/]*//[^/@]*:[^/@]*@", url):
            raise ValueError("holds a password; put the URL into an environment variable and give env:NAME")
        return url

    def resolved_url(self) -> str:
        """The URL itself. Makes the folder of a SQLite file. Raises `OSError`, or `KeyError` without the variable."""
        if self.url is not None and self.url.startswith("env:"):
            return os.environ[self.url[4:]]
        if self.url is not None:
            return self.url
        state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
        folder = Path(self.folder or f"{state}/slotpool").expanduser().absolute()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = folder / "store.sqlite3"
        # Conversations are nobody else's business; SQLite gives the files beside it the same mode.
        file.touch(mode=0o600)
        return f"sqlite:///{file}"


class KvStoreConfig(NamedTuple):
    """Where conversations outlive their engine: in so much of a node's memory, and in a folder on its disk.

    `mib` None is a quarter of what is free; `folder` None is no disk.
    """

    mib: int | None = None
    folder: str | None = None
