"""A model in a server of its own: the command is started when the model loads, and ends with it.

The server listens on a free port of the loopback interface, and requests are relayed to it as to an external server. A
server that ends by itself is a dead engine. SGLang's can give its devices back and keep its weights in the host's
memory (level 1).
"""

from __future__ import annotations

import asyncio
import contextlib
import os

import httpx

from cluster.config import LaunchedModel, ServerModel
from cluster.errors import ModelUnavailable, ReplicaGone
from cluster.sockets import free_port
from deployments.engines.launch import launch_of
from deployments.engines.openai_upstream import Target, Upstreams
from deployments.engines.protocol import Call, EngineInfo, Kept, Progress, Reply
from deployments.engines.server_process import ServerProcess
from deployments.engines.upstream_errors import Blame
from deployments.host_memory import tree_device_mib, tree_mib
from deployments.schemas import SERVED

#: Between two looks at whether a server serves, in seconds: at first, and at most.
LOOK_S = (0.05, 1.0)
#: A server that serves says so within this time, in seconds, also when it is busy.
SOON_S = 1.5
#: One such look takes so long at most, in seconds.
ANSWER_S = 5.0
#: What SGLang does with its memory.
RELEASE, RESUME = "/release_memory_occupation", "/resume_memory_occupation"


class ManagedServer:
    """`backend: server`: any command that has an OpenAI interface."""

    def __init__(self, model_id: str, model: LaunchedModel, path: str) -> None:
        self._id, self._model, self._path = model_id, model, path
        self._upstreams = Upstreams(is_local=True)
        self._looking = httpx.AsyncClient(timeout=ANSWER_S, trust_env=False)
        self._process: ServerProcess | None = None
        self._url = self._ready_path = ""
        self._memory_mib: int | None = None

    async def load(self, progress: Progress) -> None:
        model = self._model
        if model.formats and model.format not in model.formats:
            raise ModelUnavailable(f"{model.backend} does not read {model.format}")
        progress(0.0)
        port = free_port()
        launch = launch_of(self._id, model, self._path, port)
        self._url, self._ready_path = f"http://127.0.0.1:{port}", launch.ready_path
        self._process = await ServerProcess.start(launch)
        try:
            await self._until_ready()
            self._memory_mib = await asyncio.to_thread(_held_mib, self._process.pid)
        except BaseException:
            await self.stop()
            raise
        progress(1.0)

    def info(self) -> EngineInfo:
        return EngineInfo(
            paths=SERVED,
            format=self._model.format,
            memory_mib=self._memory_mib,
            url=self._url,
            pid=None if self._process is None else self._process.pid,
        )

    async def call(self, call: Call) -> Reply:
        if self._process is None or self._process.ended.done():
            raise ReplicaGone(f"the server of {self._id} is gone")
        blame = Blame(f"the server of {self._id}", is_ours=True)
        # Under which name it knows the model is seen only in its answers, so they are always given the client's.
        named = self._model.engine_kwargs.served_model if isinstance(self._model, ServerModel) else None
        return await self._upstreams.call(Target(self._url, blame, model=named or self._id), call)

    async def unload(self) -> None:
        await self.stop()
        await self._upstreams.close()
        await self._looking.aclose()

    async def died(self) -> str:
        """Wait until the server ends by itself; why it did, in words."""
        assert self._process is not None, "it was loaded"
        return await asyncio.shield(self._process.ended)

    async def answers(self) -> bool:
        try:
            return (await self._looking.get(self._url + self._ready_path, timeout=SOON_S)).status_code == 200
        except httpx.HTTPError:
            return False

    async def stop(self) -> None:
        """End the server, gently if it lets itself be."""
        if self._process is not None:
            await self._process.stop()

    async def _until_ready(self) -> None:
        """Wait until the server serves, for as long as the ledger lets it. Raises `ModelUnavailable` if it ends."""
        assert self._process is not None, "it was started"
        looking = asyncio.create_task(self._look())
        try:
            await asyncio.wait([looking, self._process.ended], return_when=asyncio.FIRST_COMPLETED)
            if self._process.ended.done():
                raise ModelUnavailable(f"{self._process.ended.result()} before it was ready; its log says more")
            looking.result()
        finally:
            looking.cancel()

    async def _look(self) -> None:
        pause_s, longest_s = LOOK_S
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if (await self._looking.get(self._url + self._ready_path)).status_code == 200:
                    return
            await asyncio.sleep(pause_s)
            pause_s = min(longest_s, pause_s * 1.5)


class SleepingServer(ManagedServer):
    """`backend: sglang`: its devices' memory can be given back while its weights stay in the host's."""

    async def sleep(self) -> Kept:
        await self._tell(RELEASE)
        assert self._process is not None, "it was loaded"
        held_mib = await asyncio.to_thread(tree_device_mib, self._process.pid)
        # What its processes hold of the host's memory is seen by whoever asked.
        return Kept(0, held_mib or 0)

    async def wake(self, progress: Progress) -> None:
        await self._tell(RESUME)
        await self._until_ready()
        progress(1.0)

    async def _tell(self, path: str) -> None:
        try:
            answer = await self._looking.post(self._url + path, json={}, timeout=None)
            answer.raise_for_status()
        except httpx.HTTPError as error:
            raise ModelUnavailable(f"the server did not do {path}: {type(error).__name__}") from None


def _held_mib(pid: int) -> int | None:
    """What a server was seen to take: of its devices if it has any, else of the host's memory. Blocks."""
    if os.environ.get("CUDA_VISIBLE_DEVICES"):
        return tree_device_mib(pid)
    return tree_mib(pid)
