"""vLLM (v1, pinned) in the engine's process: its `AsyncLLM`, and in front of it its own OpenAI serving.

The serving is vLLM's web application, called in this process: templates, tools, reasoning parsers, structured output,
logprobs, embeddings and scores are vLLM's. vLLM runs the model in processes that it starts from here. They die with
this one, and this one with them: an engine without its core can answer nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from cluster.config import VllmModel
from cluster.errors import BackendUnavailable, InvalidRequest, ModelUnavailable, ReplicaGone
from deployments.engines import asgi
from deployments.engines.protocol import EVENT_STREAM, JSON, Call, EngineInfo, Kept, Progress, Reply, Report
from deployments.engines.vllm import arguments, wire
from deployments.engines.vllm.leftovers import end_tree, left_over, own_folder, remove
from deployments.engines.vllm.memory import memory_mib
from deployments.engines.vllm.routes import routes_of
from deployments.host_memory import tree_device_mib, tree_mib

logger = logging.getLogger("slotpool.engine")

T = TypeVar("T")

#: How often it is seen whether vLLM's core lives, in seconds.
WATCH_S = 0.25


class VllmEngine:
    """Implements `Engine`, `Sleeper` and `RunsProcess`."""

    def __init__(self, model_id: str, model: VllmModel, path: str) -> None:
        self._id, self._model, self._path = model_id, model, path
        # One thread starts vLLM's processes and stays: they are bound to its life.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="vllm")
        self._client: Any = None
        self._application: asgi.Application | None = None
        self._paths: frozenset[str] = frozenset()
        self._reasons = True
        self._memory_mib: int | None = None
        self._left_over: list[Path] = []

    async def load(self, progress: Progress) -> None:
        progress(0.0)
        try:
            given = await self._in_thread(self._start)
            await self._make_application(given)
        except ModuleNotFoundError as error:
            raise ModelUnavailable(f"vLLM is not installed where its engine runs ({error.name})") from None
        except Exception as error:
            await end_tree(os.getpid())
            if isinstance(error, ModelUnavailable):
                raise
            logger.exception("vLLM did not load %s", self._id)
            raise ModelUnavailable(f"vLLM: {arguments.reason_of(error, self._path)}") from None
        self._memory_mib = await asyncio.to_thread(memory_mib, self._model, self._path)
        self._left_over = left_over(os.getpid())
        # What was made by now stays: the collector need not look at it again.
        gc.collect()
        gc.freeze()
        progress(1.0)

    def info(self) -> EngineInfo:
        context = self._client.model_config.max_model_len if self._client is not None else None
        return EngineInfo(context_length=context, paths=self._paths, format="hf", memory_mib=self._memory_mib)

    async def call(self, call: Call) -> Reply:
        if self._client is None:
            raise BackendUnavailable("the model is not loaded")
        if call.path not in self._paths:
            raise InvalidRequest(f"this model does not serve {call.path}")
        report = Report()
        if isinstance(call.body, bytes):
            return await self._raw(call, call.body, report)
        body = wire.request_body(call, self._client.model_config.max_model_len, reasons=self._reasons)
        headers = dict(EVENT_STREAM if call.stream else JSON)
        return Reply(200, headers, self._answer(call, body, report), report)

    async def sleep(self) -> Kept:
        if self._client is None or not self._client.model_config.enable_sleep_mode:
            raise ModelUnavailable("this vLLM cannot sleep")
        await self._client.sleep(level=1)
        return Kept(tree_mib(os.getpid()), tree_device_mib(os.getpid()) or 0)

    async def wake(self, progress: Progress) -> None:
        progress(0.0)
        try:
            await self._client.wake_up()
        except Exception as error:
            raise ModelUnavailable(f"vLLM did not wake: {arguments.reason_of(error, self._path)}") from None
        progress(1.0)

    async def died(self) -> str:
        """Wait until vLLM's core has died."""
        while not self._client.errored:  # noqa: ASYNC110 - vLLM tells only who asks
            await asyncio.sleep(WATCH_S)
        return "vLLM's core has died"

    async def answers(self) -> bool:
        return not self._client.errored

    async def stop(self) -> None:
        """End vLLM's processes now, and remove what they would leave: shared memory, most of all.

        Nothing runs any more, and to be asked takes them seconds.
        """
        await end_tree(os.getpid())
        remove(self._left_over)

    async def unload(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await self._in_thread(client.shutdown)
            remove(self._left_over)
        self._thread.shutdown(wait=False)

    # --- loading ------------------------------------------------------------------------------------------------------

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _start(self) -> Any:
        """Start vLLM; its arguments. Blocks until the model is loaded. Raises what vLLM raises."""
        arguments.set_environment()
        os.environ["VLLM_RPC_BASE_PATH"] = str(own_folder())
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        given = arguments.arguments_of(self._id, self._model, self._path)
        engine = AsyncEngineArgs.from_cli_args(given)
        self._client = AsyncLLM.from_engine_args(engine, usage_context=UsageContext.OPENAI_API_SERVER)
        return given

    async def _make_application(self, given: Any) -> None:
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app

        tasks = await self._client.get_supported_tasks()
        application = build_app(given, tasks, self._client.model_config)
        await init_app_state(self._client, application.state, given, tasks)
        self._application = application
        self._paths = routes_of(tasks)
        if "generate" in tasks:
            template = given.chat_template or getattr(self._client.get_tokenizer(), "chat_template", None)
            self._reasons = bool(getattr(given, "reasoning_parser", None)) or may_reason(template)

    # --- answering ----------------------------------------------------------------------------------------------------

    def _send(self, call: Call, body: bytes) -> AsyncGenerator[asgi.Head | bytes, None]:
        assert self._application is not None, "an engine that is loaded has an application"
        headers = {
            **call.headers,
            "content-type": call.headers.get("content-type", "application/json"),
            "content-length": str(len(body)),
            "x-request-id": call.request_id,
            "x-vllm-priority": str(call.priority),
        }
        return asgi.answer(self._application, call.method, call.path, call.query, headers, body)

    async def _answer(self, call: Call, body: bytes, report: Report) -> AsyncGenerator[bytes, None]:
        """The answer to one of the pool's own routes, in the pool's words."""
        started = time.perf_counter()
        answer = wire.Answer(call, self._id, report, self._piece)
        whole = bytearray()
        async with contextlib.aclosing(self._send(call, body)) as parts:
            status, streams = 200, False
            try:
                async for part in parts:
                    if isinstance(part, asgi.Head):
                        status = part.status
                        streams = call.stream and status == 200
                    elif streams:
                        report.ttft_ms = report.ttft_ms or _ms_since(started)
                        report.total_ms = _ms_since(started)
                        if said := answer.event(part):
                            yield said
                    else:
                        whole += part
                report.total_ms = _ms_since(started)
                if status != 200:
                    raise self._refusal(status, bytes(whole), call)
                if not streams:
                    yield answer.body(bytes(whole))
            finally:
                report.total_ms = _ms_since(started)

    async def _raw(self, call: Call, body: bytes, report: Report) -> Reply:
        """vLLM's answer as it is, once it has begun."""
        heads: list[asgi.Head] = []
        chunks = _passed_on(self._send(call, body), heads, report)
        # From here on closing the chunks ends the work.
        await anext(chunks)
        (head,) = heads
        kept = {name: value for name, value in head.headers.items() if name != "content-length"}
        return Reply(head.status, kept, chunks, report)

    def _piece(self, token: int) -> str:
        text: str = self._client.get_tokenizer().decode([token])
        return text

    def _refusal(self, status: int, body: bytes, call: Call) -> Exception:
        if self._client.errored:
            return ReplicaGone("the engine went away", retry_after=1)
        return wire.refusal(status, body, call.json)


async def _passed_on(
    parts: AsyncGenerator[asgi.Head | bytes, None], heads: list[asgi.Head], report: Report
) -> AsyncGenerator[bytes, None]:
    """An empty part once the head is there, and then the body's."""
    started = time.perf_counter()
    async with contextlib.aclosing(parts):
        async for part in parts:
            if isinstance(part, asgi.Head):
                heads.append(part)
                yield b""
            else:
                yield part
    report.total_ms = _ms_since(started)


def may_reason(template: Any) -> bool:
    """Whether a chat template does something with what it is told about thinking; one that is not known may."""
    return not isinstance(template, str) or any(word in template for word in ("reasoning_effort", "enable_thinking"))


def _ms_since(started: float) -> float:
    return (time.perf_counter() - started) * 1e3
