"""What passes between a request on the event loop and what makes its tokens: the work going in, the text coming out.

An engine that keeps more of a sequence adds it in a class of its own. Nothing here knows of an engine's library.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from cluster.errors import PoolError
from deployments.engines.chat.logprobs import TokenLogprob
from deployments.engines.chat.request import Sampling
from deployments.engines.chat.utf8 import TextAssembler

#: A sequence with more deltas than this unread pauses until its reader has caught up.
MAX_UNREAD = 256

G = TypeVar("G", bound="Generation")

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Delta:
    """What one sequence has to say after a step. `finish` ("stop" or "length") or `error` is on the last one.

    `stop` is the stop string that ended it, if one did.
    """

    index: int
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: str | None = None
    stop: str | None = None
    error: PoolError | None = None
    #: The sum of the hidden states of all tokens of the prompt, where that is what was asked for.
    embedding: npt.NDArray[np.float32] | None = None


class Mailbox:
    """Hand-over of one call's deltas to its event loop. `put` and `take` run on that loop.

    The decode thread asks `is_behind` before it makes another token of a sequence, and must be woken with `on_read`
    once the reader has caught up: `paused` says that it has seen one that was behind.
    """

    def __init__(self, on_read: Callable[[], None]) -> None:
        self.loop = asyncio.get_running_loop()
        self.paused = False
        self._on_read = on_read
        self._deltas: list[Delta] = []
        self._taken: dict[int, int] = {}
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
        for delta in deltas:
            self._taken[delta.index] = self._taken.get(delta.index, 0) + 1
        if self.paused:
            self.paused = False
            self._on_read()
        return deltas

    def is_behind(self, index: int, said: int) -> bool:
        """Whether too many of the `said` deltas of one sequence are unread. Runs in the decode thread."""
        if said - self._taken.get(index, 0) <= MAX_UNREAD:
            return False
        # Set first and looked at again: whatever is read in this moment either counts here or sees the flag.
        self.paused = True
        return said - self._taken.get(index, 0) > MAX_UNREAD


@dataclass(slots=True, eq=False)
class Job(Generic[G]):
    """All sequences of one call. `pending` are those that have not started; at most `width` run at a time."""

    mailbox: Mailbox
    width: int
    pending: deque[G] = field(default_factory=deque)
    cancelled: bool = False


@dataclass(slots=True, eq=False)
class Generation:
    """One sequence to generate, and how far it is. After `submit` only the thread that decodes changes it."""

    index: int
    job: Job[Any]
    prompt: list[int]
    #: Tokens it may make, from the request and from what is left of the context.
    limit: int
    sampling: Sampling
    assembler: TextAssembler
    top_logprobs: int | None = None
    #: Report the log-probabilities of the prompt's own tokens too (`echo` with `logprobs`).
    prompt_logprobs: bool = False
    ignore_eos: bool = False
    #: Render control tokens as text: a tool call may be written with them.
    special: bool = False
    #: The text of the prompt's first token, for `prompt_logprobs`.
    first_piece: bytes = b""

    #: How many deltas were sent to the mailbox.
    said: int = 0
    #: Tokens of the prompt that needed no evaluation; those that a saved conversation gave, None if none was sought.
    reused: int = 0
    restored: int | None = None
    produced: int = 0
    started_at: float = 0.0
    first_token_at: float = 0.0
    ended_at: float = 0.0

    @property
    def is_behind(self) -> bool:
        """Whether its reader has to catch up before it goes on."""
        return self.job.mailbox.is_behind(self.index, self.said)


def deliver(deltas: list[tuple[Mailbox, Delta]]) -> None:
    """Hand over what a step of a thread has to say, with one call to each event loop."""
    for loop in {mailbox.loop for mailbox, _ in deltas}:
        try:
            loop.call_soon_threadsafe(_put_all, [pair for pair in deltas if pair[0].loop is loop])
        except RuntimeError:
            logger.warning("the event loop of a request has gone; its tokens are dropped")


def _put_all(deltas: list[tuple[Mailbox, Delta]]) -> None:
    for mailbox, delta in deltas:
        mailbox.put(delta)
