"""Runs a load test: streams every answer, and notes when its parts came."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx

from app.cli.loadtest.plan import LoadPlan


@dataclass(slots=True)
class Sample:
    """One request. Times are in seconds; None is what did not happen. `error` is why it failed, in a few words."""

    started_s: float
    ttft_s: float | None = None
    total_s: float | None = None
    output_tokens: int = 0
    prompt_tokens: int | None = None
    error: str | None = None

    @property
    def tpot_s(self) -> float | None:
        """Seconds per token after the first."""
        if self.error or self.ttft_s is None or self.total_s is None or self.output_tokens < 2:
            return None
        return (self.total_s - self.ttft_s) / (self.output_tokens - 1)


@dataclass(slots=True)
class Measured:
    """All requests that were sent, and how long the test took in seconds. `stopped`: before all were answered."""

    samples: list[Sample]
    wall_s: float
    stopped: bool = False


class LoadTest:
    """One load test. `run` may be cancelled, and then gives what was measured until then."""

    def __init__(self, plan: LoadPlan, client: httpx.AsyncClient, tell: Callable[[int], None] = lambda done: None):
        self.plan = plan
        self.samples: list[Sample] = []
        self._client = client
        self._tell = tell
        self._work = list(zip(plan.starts(), plan.prompts(), strict=True))[::-1]
        self._began = 0.0
        self._done = 0

    async def run(self) -> Measured:
        """Send what the plan says, and wait for the answers, no longer than it allows."""
        self._began = time.monotonic()
        stopped = False
        clients = [asyncio.create_task(self._client_loop()) for _ in range(min(self.plan.concurrency, len(self._work)))]
        try:
            async with asyncio.timeout(self.plan.duration_s):
                await asyncio.gather(*clients)
        except (TimeoutError, asyncio.CancelledError):
            # Ctrl-C comes as a cancellation; what was measured until then is to be shown.
            stopped = True
        finally:
            for each in clients:
                each.cancel()
            await asyncio.gather(*clients, return_exceptions=True)
        return Measured(self.samples, time.monotonic() - self._began, stopped)

    async def _client_loop(self) -> None:
        while self._work:
            start, prompt = self._work.pop()
            await asyncio.sleep(max(0.0, self._began + start - time.monotonic()))
            sample = Sample(time.monotonic() - self._began)
            try:
                await self._ask(prompt, sample)
            except asyncio.CancelledError:
                # Neither served nor refused: the test's own time was over.
                raise
            except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
                sample.error = f"{type(error).__name__}: {error}".strip(": ")[:200]
            self.samples.append(sample)
            self._done += 1
            self._tell(self._done)

    async def _ask(self, prompt: str, sample: Sample) -> None:
        sent_at = time.monotonic()
        body = {
            "model": self.plan.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": self.plan.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        path = "/v1/chat/completions"
        async with self._client.stream("POST", path, json=body, timeout=self.plan.timeout_s) as answer:
            if answer.status_code >= 400:
                await answer.aread()
                sample.error = f"{answer.status_code} {_reason(answer)}"[:200]
                return
            chunks = 0
            async for line in answer.aiter_lines():
                if not line.startswith("data:"):
                    continue
                data = line[5:].strip()
                if data == "[DONE]":
                    break
                event = json.loads(data)
                if event.get("error"):
                    sample.error = str(_message(event))[:200]
                    return
                if _has_text(event):
                    chunks += 1
                    if sample.ttft_s is None:
                        sample.ttft_s = time.monotonic() - sent_at
                if event.get("usage"):
                    sample.output_tokens = int(event["usage"].get("completion_tokens") or 0)
                    sample.prompt_tokens = event["usage"].get("prompt_tokens")
            sample.total_s = time.monotonic() - sent_at
            # A server that does not count has sent about one token in each chunk.
            sample.output_tokens = sample.output_tokens or chunks
            if sample.ttft_s is None:
                sample.error = "an answer without text"


def _has_text(event: dict[str, Any]) -> bool:
    deltas = (choice.get("delta") or {} for choice in event.get("choices") or ())
    return any(delta.get("content") or delta.get("reasoning_content") for delta in deltas)


def _message(data: Any) -> Any:
    error = data.get("error") if isinstance(data, dict) else None
    return error.get("message") if isinstance(error, dict) else error


def _reason(answer: httpx.Response) -> str:
    try:
        return str(_message(answer.json()) or "")
    except ValueError:
        return ""
