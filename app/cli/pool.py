"""A running pool as the client commands see it, over HTTP: the options that find it, its answers, and its errors."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit

import click
import httpx
from click.shell_completion import CompletionItem

from app.cli.output import Failure, Misuse, Unreachable
from app.loopback import is_loopback

DEFAULT_URL = "http://127.0.0.1:8000"
KEY_VARIABLE = "SLOTPOOL_API_KEY"
#: Seconds that a plain question may take, and that a connection may.
ANSWER_S, CONNECT_S = 30.0, 5.0
#: Who follows a pool looks for it so many times, with a pause in seconds, when it is lost.
RETRIES, RETRY_S = 30, 1.0
#: What a shell waits for while it completes a model's name, in seconds.
COMPLETE_S = 0.5
#: The change log keeps 10,000 entries; some are lost between the question for its end and that for the rest.
HISTORY = 9_900


class Refused(Failure):
    """The pool answers, and does not do what was asked. `status` is HTTP's."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status

    @property
    def wants_key(self) -> bool:
        """Whether another key, or any, would help."""
        return self.status in (401, 403)


class Event(NamedTuple):
    """One server-sent event. `data` is what its JSON holds, None where that is none."""

    kind: str
    id: str
    data: Any


class Pool:
    """One pool at a URL. Every call raises `Failure` with one line for what goes wrong; the key is in none."""

    def __init__(
        self,
        url: str,
        key: str | None,
        transport: httpx.BaseTransport | None = None,
        answer_s: float = ANSWER_S,
        is_key_named: bool = False,
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._transport = transport
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._key = key
        self._is_key_named = is_key_named
        host = urlsplit(self.url).hostname
        if not host or urlsplit(self.url).scheme not in ("http", "https"):
            raise Misuse(f"{url!r} is no http:// or https:// URL")
        # A proxy of the environment does not lead back to this machine.
        self._trust_env = not is_loopback(host)
        self._http = httpx.Client(
            base_url=self.url,
            headers=self._headers,
            timeout=httpx.Timeout(answer_s, connect=min(answer_s, CONNECT_S)),
            transport=transport,
            trust_env=self._trust_env,
        )

    def at(self, url: str) -> Pool:
        """Another address. The environment's key is the pool's: only one that was named for this call goes along."""
        other = Pool(url, self._key if self._is_key_named else None, self._transport)
        return self if other.url == self.url else other

    def async_client(self, limits: httpx.Limits) -> httpx.AsyncClient:
        """A client of its own for many calls at a time, to be closed by its user."""
        transport = self._transport if isinstance(self._transport, httpx.AsyncBaseTransport) else None
        return httpx.AsyncClient(
            base_url=self.url, headers=self._headers, limits=limits, transport=transport, trust_env=self._trust_env
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._http.close()

    def get(self, path: str, **params: str) -> Any:
        """The JSON of a route."""
        with self._reaching():
            return checked(self._http.get(path, params=params))

    def send(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON that a route answers to a body. Waits as long as it takes: loads do."""
        with self._reaching():
            waiting = httpx.Timeout(None, connect=CONNECT_S)
            return checked(self._http.request(method, path, json=dict(body or {}), timeout=waiting))

    @contextlib.contextmanager
    def lines(self, method: str, path: str, **options: Any) -> Iterator[Iterator[str]]:
        """The lines of a streamed answer, as they come."""
        waiting = httpx.Timeout(None, connect=CONNECT_S)
        with self._reaching(), self._http.stream(method, path, timeout=waiting, **options) as response:
            if response.status_code >= 400:
                response.read()
                checked(response)
            yield response.iter_lines()

    @contextlib.contextmanager
    def events(self, seen: str | None = None) -> Iterator[Iterator[Event]]:
        """The change log from now on, which begins with a snapshot, or from behind the event `seen`."""
        headers = {"Last-Event-ID": seen} if seen else {}
        with self.lines("GET", "/v1/admin/events", headers=headers) as lines:
            yield events_of(lines)

    def follow(self) -> Iterator[Event]:
        """The change log from now on, also beyond an ingress that is replaced. Endless; raises `Failure`."""
        seen: str | None = None
        lost = 0
        while True:
            try:
                with self.events(seen) as found:
                    for event in found:
                        seen, lost = event.id or seen, 0
                        yield event
            except Unreachable:
                # Who never reached it has the wrong address.
                if seen is None or lost >= RETRIES:
                    raise
            lost += 1
            if lost > RETRIES:
                raise Unreachable(f"the pool at {self.url} tells nothing any more")
            time.sleep(RETRY_S)

    def history(self) -> list[dict[str, Any]]:
        """What the change log still has, the oldest first."""
        with self.events() as found:
            end = next((event.id for event in found if event.kind == "snapshot"), "")
        epoch, _, version = end.rpartition("-")
        if not version.isdigit() or version == "0":
            return []
        entries: list[dict[str, Any]] = []
        with self.events(f"{epoch}-{max(0, int(version) - HISTORY)}") as found:
            for event in found:
                if event.kind == "snapshot":
                    break
                if isinstance(event.data, dict) and "version" in event.data:
                    entries.append(event.data)
                    if event.data["version"] >= int(version):
                        break
        return entries

    @contextlib.contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except httpx.ConnectError:
            raise Unreachable(
                f"no pool answers at {self.url}: start one with slotpool serve, or name another with --url"
            ) from None
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise Unreachable(f"lost the pool at {self.url}: {reason}") from None


def checked(response: httpx.Response) -> Any:
    """The JSON of an answer. Raises `Failure` with what the pool says where it refuses."""
    try:
        data = response.json()
    except ValueError:
        data = None
    if response.status_code >= 400:
        raise Refused(refusal(response.status_code, data), response.status_code)
    if data is None:
        raise Failure(f"{response.url} is no pool: it does not answer with JSON")
    return data


def refusal(status: int, data: Any) -> str:
    """What an error's body says, and where a key is missing, how to show one."""
    error = data.get("error") if isinstance(data, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    text = str(message or f"the pool answered {status}")
    return f"{text} (set {KEY_VARIABLE}, or name a file with --key-file)" if status in (401, 403) else text


def events_of(lines: Iterable[str]) -> Iterator[Event]:
    """Server-sent events of a stream's lines; comments are left out."""
    kind, identity, data = "message", "", ""
    for line in lines:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if line == "":
            if data:
                yield Event(kind, identity, _json(data))
            kind, data = "message", ""
        elif name == "event":
            kind = value
        elif name == "id":
            identity = value
        elif name == "data":
            data = f"{data}\n{value}" if data else value


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def read_key(file: Path | None) -> str | None:
    """The key to show: from the file, or else from the environment."""
    if file is None:
        return os.environ.get(KEY_VARIABLE) or None
    try:
        return file.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        raise Misuse(f"the key file {file} cannot be read") from None


def pool_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options that find a pool, and gives the command that pool as its first argument."""

    @click.option(
        "--url", envvar="SLOTPOOL_URL", default=DEFAULT_URL, show_default=True, help="Where the pool answers."
    )
    @click.option("--key-file", type=click.Path(path_type=Path), help=f"A file with the key; else {KEY_VARIABLE}.")
    @click.pass_context
    @functools.wraps(command)
    def with_pool(ctx: click.Context, /, *args: Any, url: str, key_file: Path | None, **options: Any) -> Any:
        # Tests put a transport of their own into the context.
        with Pool(url, read_key(key_file), ctx.obj, is_key_named=key_file is not None) as pool:
            return command(pool, *args, **options)

    return with_pool


def complete_model(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The models of the pool that begin so, for a shell. None where no pool answers at once."""
    with contextlib.suppress(Failure, KeyError, TypeError):
        url = ctx.params.get("url") or os.environ.get("SLOTPOOL_URL") or DEFAULT_URL
        with Pool(url, read_key(ctx.params.get("key_file")), ctx.obj, COMPLETE_S) as pool:
            rows = pool.get("/v1/models")["data"]
        return [CompletionItem(row["id"]) for row in rows if row["id"].startswith(incomplete)]
    return []
