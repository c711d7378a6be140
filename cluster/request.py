"""One client request as it travels whole from its route through gateway, client and actor to the ledger."""

from __future__ import annotations

from typing import NamedTuple


class Request(NamedTuple):
    """Everything the ledger needs to know of a request, and no body.

    `id` is the attempt's: the gateway gives each attempt of one client request its own. `priority` is 1 high,
    2 medium, 3 low. `timeout_s` counts from the moment in which the request is sent to the ledger. `keep_alive_s` is
    how long the model should stay afterwards: None = its idle timeout, -1 = pin. `slots` is how many sequences it
    will run (choices times prompts), before that is clamped to what a replica has. `principal` is the API key's
    name; `trace` is the client's own `X-Request-Id`, for logs. One that `is_patient` is not refused for load.
    """

    id: str
    model: str
    path: str = "/v1/chat/completions"
    priority: int = 2
    timeout_s: float = 600.0
    keep_alive_s: float | None = None
    slots: int = 1
    principal: str = "anonymous"
    trace: str = ""
    is_patient: bool = False
