"""What a client gets when the replica that answers it vanishes, by the moment in which it does."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.config import load_config
from cluster.errors import PoolError, ReplicaGone
from cluster.ledger.events import Grant
from cluster.metrics import Outcome
from cluster.request import Request
from deployments.engines.protocol import Call
from deployments.gateway import Gateway
from deployments.leased_call import LeasedCall
from deployments.limits import Limits
from deployments.request_log import RequestLog
from deployments.run_info import RunInfo
from deployments.sse import DONE

GONE = ReplicaGone("the replica of m went away", retry_after=1)
EVENT = b'data: {"choices":[]}\n\n'
BODY = b'{"choices":[]}'


class Scripted(Gateway):
    """A gateway whose attempts go by a script: chunks, and how each attempt ends."""

    def __init__(self, *attempts: list[bytes | PoolError]) -> None:
        self.attempts = iter(attempts)
        remote = {"backend": "openai_compatible", "remote_base_url": "https://api.example.com"}
        self.config = load_config({"models": {"m": {"backend": "fake"}, "far": remote}}, environ={})
        self.limits = Limits()
        self.request_log = RequestLog()

    async def _attempt(
        self, request: Request, body: dict[str, Any], info: RunInfo, **_: Any
    ) -> AsyncGenerator[bytes, None]:
        for step in next(self.attempts):
            if isinstance(step, PoolError):
                raise step
            yield step


async def answer(gateway: Gateway, stream: bool) -> list[bytes]:
    return [chunk async for chunk in gateway.stream(Request("r", "m"), {"stream": stream})]


async def test_a_whole_answer_whose_replica_vanished_behind_it_is_tried_again_and_sent_once():
    assert await answer(Scripted([BODY, GONE], [BODY]), stream=False) == [BODY]


async def test_a_whole_answer_that_never_comes_is_an_error_and_no_half_body():
    with pytest.raises(ReplicaGone):
        await answer(Scripted([BODY, GONE], [BODY[:5], GONE]), stream=False)


async def test_a_whole_answer_in_parts_is_one_body():
    assert await answer(Scripted([BODY[:5], BODY[5:]]), stream=False) == [BODY]


async def test_a_stream_is_tried_again_while_only_comments_were_sent():
    assert await answer(Scripted([b": queued\n\n", GONE], [EVENT, DONE]), stream=True) == [
        b": queued\n\n",
        EVENT,
        DONE,
    ]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_remote_api_is_not_asked_again(stream: bool):
    gateway = Scripted([GONE], [EVENT, DONE])
    with pytest.raises(ReplicaGone):
        await anext(gateway.stream(Request("r", "far"), {"stream": stream}))
    assert len(list(gateway.attempts)) == 1, "what it may have been paid for already"


async def test_a_stream_cut_in_the_middle_ends_with_an_error_event():
    *sent, last = await answer(Scripted([EVENT, GONE], [EVENT, DONE]), stream=True)
    assert sent == [EVENT]
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == GONE.code


async def test_a_stream_that_has_said_its_last_word_gets_no_error_behind_it():
    assert await answer(Scripted([EVENT, EVENT + DONE, GONE]), stream=True) == [EVENT, EVENT + DONE]


async def test_a_refusal_before_the_first_byte_is_raised():
    with pytest.raises(ReplicaGone):
        await answer(Scripted([GONE], [GONE]), stream=True)


class Granted(Gateway):
    """A gateway whose ledger grants after `wait_s`; what was asked of it, and how long the answer might take."""

    def __init__(self, wait_s: float) -> None:
        self.config = load_config({"models": {"m": {"backend": "fake"}}}, environ={})
        self.limits = Limits()
        self.request_log = RequestLog()
        self.asked: list[Request] = []
        self.left_s = 0.0
        self.ended: list[Outcome | None] = []

        async def acquire(request: Request) -> Grant:
            self.asked.append(request)
            await asyncio.sleep(wait_s)
            return Grant(request.id, "h", "m", "m#1", (0,), 1, 0.0, 0.0, devices=())

        def release(lease: Grant, outcome: Outcome | None = None) -> None:
            self.ended.append(outcome)

        self.ledger: Any = SimpleNamespace(acquire=acquire, release=release)

    async def _run(
        self, request: Request, call: Call, lease: Grant, info: RunInfo, run: LeasedCall, left_s: float
    ) -> AsyncGenerator[bytes, None]:
        self.left_s = left_s
        for chunk in (EVENT, DONE) if call.stream else (BODY,):
            yield chunk


async def test_who_waits_as_long_as_his_client_stays_asks_once_and_then_has_all_of_his_time():
    hasty, patient = Granted(wait_s=0.05), Granted(wait_s=0.05)
    await answer(hasty, stream=False)
    [chunk async for chunk in patient.stream(Request("r", "m", timeout_s=0.01, is_patient=True), {})]
    assert hasty.left_s < hasty.asked[0].timeout_s <= 600.0
    assert (len(patient.asked), patient.asked[0].is_patient, patient.left_s) == (1, True, 0.01)
    assert patient.asked[0].timeout_s > 86_400.0
    await patient.touch(Request("r", "m", timeout_s=0.01, is_patient=True))
    assert patient.asked[1].timeout_s > 86_400.0


@pytest.mark.parametrize(("last", "status"), [(DONE, 200), (EVENT, 499)])
async def test_who_leaves_behind_the_last_word_has_all_of_it(last: bytes, status: int):
    gateway = Granted(wait_s=0.0)
    async with contextlib.aclosing(gateway.stream(Request("r", "m"), {"stream": True})) as chunks:
        async for chunk in chunks:
            if chunk == last:
                break
    assert [outcome and outcome.status for outcome in gateway.ended] == [status]
