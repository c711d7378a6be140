"""What passes between a request on the event loop and the decode thread: the work going in, the text coming out."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from cluster.errors import PoolError
from deployments.engines.chat.logprobs import TokenLogprob
from deployments.engines.chat.utf8 import TextAssembler
from deployments.engines.llama_cpp.sampling import Sampler


@dataclass(slots=True)
class Delta:
    """What one sequence has to say after a step. `finish` ("stop" or "length") or `error` is on the last one."""

    index: int
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: str | None = None
    error: PoolError | None = None


class Mailbox:
    """Hand-over of one call's deltas to its event loop. All methods run on that loop."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._deltas: list[Delta] = []
        self._waiter: asyncio.Future[None] | None = None

    def put(self, delta: Delta) -> None:
        self._deltas.append(delta)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> list[Delta]:
        """All deltas since the last call; waits until there is one."""
        if not self._deltas:
            self._waiter = self.loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        deltas, self._deltas = self._deltas, []
        return deltas


@dataclass(slots=True, eq=False)
class Generation:
    """One sequence to generate, and how far it is. After `submit` only the decode thread changes it."""

    index: int
    prompt: list[int]
    #: Tokens it may make, from the request and from what is left of the context.
    limit: int
    sampler: Sampler
    assembler: TextAssembler
    mailbox: Mailbox
    top_logprobs: int | None = None
    #: Report the log-probabilities of the prompt's own tokens too (`echo` with `logprobs`).
    prompt_logprobs: bool = False
    ignore_eos: bool = False
    #: Render control tokens as text: a tool call may be written with them.
    special: bool = False
    #: The text of the prompt's first token, for `prompt_logprobs`.
    first_piece: bytes = b""

    cancelled: bool = False
    reused: int = 0
    evaluated: int = 0
    produced: int = 0
    started_at: float = 0.0
    first_token_at: float = 0.0
    ended_at: float = 0.0
    pending_logprobs: list[TokenLogprob] = field(default_factory=list)
