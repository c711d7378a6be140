"""The pool's changes in plain English: one sentence for each, with the reason that the ledger gave for it.

Pure text from plain data: entries of the change log as `GET /v1/admin/events` sends them, and rows of the snapshot as
`/v1/status` shows them. What a reason means is told here and nowhere else, for whoever shows it to people.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Why something was decided, by the `rule` or `reason` of `ledger.transitions`. `{waiter}` is who it was for.
REASONS = {
    "demand": "{waiter} waits for it",
    "operator": "an operator asked for it",
    "kept": "it is started ahead of demand",
    "leaving": "{waiter} needs the room, and what was there was leaving already",
    "idle": "{waiter} needs the room, and what was there was idle",
    "surplus": "{waiter} needs the room, and what was there was more than its model has to keep",
    "class": "{waiter} is of a higher class than all that runs and waits there",
    "bound": "{waiter} must not wait much longer",
    "pays": "the swap saves more waiting here than it costs there",
    "idle_timeout": "nobody has used it for its idle timeout",
    "config": "its configuration has changed",
    "lost_node": "its machine is gone",
    "max_asleep": "more replicas sleep than may",
    "load_timeout": "its load took too long",
    "unasked": "nobody had asked for it",
    "stopped": "it is being stopped",
    "wake": "it could not be woken",
    "withdrawn": "nobody needs it any more",
}

#: Shorter waits are not worth a word, in seconds.
LEAST_WAIT_S = 0.05

#: What happened to a replica, by the cause of its transition (`ledger.states`).
CAUSES = {
    "placed": "A process for {model} starts{place}",
    "announced": "A process for {model} is there{place}",
    "assigned": "{model} begins to load{place}",
    "loaded": "{model} serves{place}",
    "quiesced": "{model} takes nothing new and ends what runs{place}",
    "reopened": "{model} takes requests again{place}",
    "emptied": "{model} has ended its last request and unloads{place}",
    "withdrawn": "The load of {model} is taken back{place}",
    "unloaded": "{model} is unloaded{place}",
    "failed": "{model} has failed{place}",
    "engine_died": "The engine of {model} died{place}",
    "dismissed": "A process of {model} is to end{place}",
    "gone": "A process of {model} has ended{place}",
    "slept": "{model} sleeps{place}",
    "demoted": "{model}, which sleeps, is ended{place}",
}

#: The causes that somebody decided; the others follow from them, and their reason was told before.
DECISIONS = frozenset(("placed", "quiesced", "withdrawn", "dismissed", "demoted"))


def of_change(change: Mapping[str, Any]) -> str:
    """One entry of the change log as a sentence. An entry of a kind that is not known is told as its kind."""
    data = change.get("data") or {}
    tell = _KINDS.get(str(change.get("kind")))
    text = tell(change.get("model"), data) if tell else str(change.get("kind"))
    return f"{text}."


def why(because: Mapping[str, Any] | None, reason: str = "") -> str:
    """Why something was decided, as the part of a sentence that follows "because"; empty where nobody decided it."""
    because = because or {}
    rule = str(because.get("rule") or reason)
    text = REASONS.get(rule, rule).format(waiter=_waiter(because))
    bound_in_s, cost_s = because.get("bound_in_s"), because.get("cost_s")
    if rule in ("bound", "class", "pays") and bound_in_s is not None:
        text += f" (its bound is {bound_in_s:.1f} s away)" if bound_in_s >= 0 else f" (overdue by {-bound_in_s:.1f} s)"
    if cost_s:
        text += f", which costs those who give way {cost_s:.1f} request-seconds"
    return text


def of_model(name: str, row: Mapping[str, Any], now: float) -> str:
    """How a model stands: its row of the snapshot at the time `now` of the ledger's clock."""
    parts = [f"{name} is {_state(row)}"]
    if row.get("leases"):
        parts.append(f"runs {counted(row['leases'], 'request')}")
    if row.get("queued"):
        since = row.get("waiting_since")
        first = "" if since is None else f", the first for {max(0.0, now - since):.1f} s"
        parts.append(f"{counted(row['queued'], 'request')} {_verb(row['queued'])} for it{first}")
    text = "; ".join(parts)
    if row.get("last_error"):
        text += f". It failed: {first_line(row['last_error'])}"
        if row.get("backoff_until") is not None and row["backoff_until"] > now:
            text += f". It is tried again in {row['backoff_until'] - now:.0f} s"
    return f"{text}."


def counted(number: int, noun: str) -> str:
    """`1 request`, `2 requests`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def first_line(text: str) -> str:
    """What an error says first, without a traceback behind it."""
    return text.strip().partition("\n")[0].rstrip(".")


def _replica(model: str | None, data: Mapping[str, Any]) -> str:
    cause = str(data.get("cause"))
    devices = ", ".join(map(str, data.get("devices") or ()))
    place = f" on device {devices}" if devices else ""
    text = CAUSES.get(cause, "{model}: " + cause).format(model=model, place=place)
    reason = why(data.get("because"), str(data.get("reason") or "")) if cause in DECISIONS else ""
    return f"{text}, because {reason}" if reason else text


def _swap(model: str | None, data: Mapping[str, Any]) -> str:
    victims = list(data.get("victims") or ())
    room = f"the room of {counted(len(victims), 'replica')}" if victims else "room"
    return f"{model} gets {room}, because {why(data.get('because'), str(data.get('reason') or ''))}"


def _model(model: str | None, data: Mapping[str, Any]) -> str:
    if data.get("removed"):
        return f"{model} is no longer there"
    error = data.get("last_error")
    return f"{model} is {data.get('state')}" + (f": {first_line(error)}" if error else "")


def _queue(model: str | None, data: Mapping[str, Any]) -> str:
    queued = int(data.get("queued") or 0)
    if not queued:
        return f"Nobody waits for {model}"
    classes = zip(("high", "medium", "low"), data.get("by_class") or (), strict=False)
    shown = ", ".join(f"{count} {name}" for name, count in classes if count)
    return f"{counted(queued, 'request')} {_verb(queued)} for {model}" + (f" ({shown})" if shown else "")


def _lease(model: str | None, data: Mapping[str, Any]) -> str:
    return f"{model} runs {counted(int(data.get('leases') or 0), 'request')}"


def _load(model: str | None, data: Mapping[str, Any]) -> str:
    return f"{model} is loaded to {float(data.get('progress') or 0):.0%}"


def _request(model: str | None, data: Mapping[str, Any]) -> str:
    name = data.get("trace") or data.get("id")
    waits = {"in line": data.get("queue_wait_s"), "for the load": data.get("load_wait_s")}
    parts = [
        f"waited {each:.1f} s {where}" for where, each in waits.items() if each is not None and each >= LEAST_WAIT_S
    ]
    if data.get("ttft_s") is not None:
        parts.append(f"had its first token after {data['ttft_s']:.2f} s")
    if data.get("total_s") is not None:
        parts.append(f"got {counted(int(data.get('output_tokens') or 0), 'token')} in {data['total_s']:.2f} s")
    told = f"Request {name} to {model} ended with {data.get('status')}"
    return f"{told}: it {', '.join(parts)}" if parts else told


def _requests(model: str | None, data: Mapping[str, Any]) -> str:
    count = int(data.get("count") or 0)
    return f"{counted(count, 'more request')} ended, with {counted(int(data.get('output_tokens') or 0), 'token')}"


def _server(model: str | None, data: Mapping[str, Any]) -> str:
    url = data.get("url")
    if data.get("removed"):
        return f"The server {url} is no longer configured"
    if not data.get("is_up"):
        return f"The server {url} cannot be read: {first_line(str(data.get('last_refresh_error')))}"
    busy = f" with {data.get('current_model')}" if data.get("current_model") else ""
    return f"The server {url} runs {data.get('active_requests')} of {data.get('max_concurrent')} requests{busy}"


def _config(model: str | None, data: Mapping[str, Any]) -> str:
    return "The configuration has changed"


_KINDS = {
    "replica": _replica,
    "swap": _swap,
    "model": _model,
    "queue": _queue,
    "lease": _lease,
    "load": _load,
    "request": _request,
    "requests": _requests,
    "server": _server,
    "config": _config,
}


def _waiter(because: Mapping[str, Any]) -> str:
    request = because.get("request") or because.get("waiter")
    return f"request {request}" if request else "a request"


def _state(row: Mapping[str, Any]) -> str:
    if row.get("state") == "unloaded" and row.get("asleep"):
        return "asleep"
    return str(row.get("state")) + (" and pinned" if row.get("pinned") else "")


def _verb(number: int) -> str:
    return "waits" if number == 1 else "wait"
