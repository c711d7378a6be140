"""A pool of one external server, which somebody else has started: the pool has its URL, sends it what a lease allows,
and can neither load nor unload it. That somebody starts it again when it has died, as a service manager does."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncGenerator
from pathlib import Path

import httpx

from cluster.config import PoolConfig
from cluster.sockets import free_port
from deployments.host_memory import tree_mib
from deployments.parents import die_with_parent
from deployments.weights import resolve_weights
from tests.contract.engine_server_process import BATCH, NATIVE
from tests.contract.pool import LOAD_S, MODEL, SLOTS, Ledger, OneModel
from tests.pool import SMOLLM2

#: Between two looks at whether the server serves, in seconds.
LOOK_S = 0.05


class NativeServer:
    """llama.cpp's own server with SmolLM2, on one port for all its lives."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "server.log"
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self.process = self._start()

    def kill(self) -> None:
        """Kill it, and wait until it is gone."""
        self.process.kill()
        self.process.wait()

    def restart(self) -> None:
        """Start it again on the same port."""
        self.process = self._start()

    async def serves(self) -> None:
        """Wait until it serves the model."""
        async with asyncio.timeout(LOAD_S), httpx.AsyncClient(trust_env=False) as http:
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    if (await http.get(f"{self.url}/health")).status_code == 200:
                        return
                assert self.process.poll() is None, self._log.read_text()
                await asyncio.sleep(LOOK_S)

    def _start(self) -> subprocess.Popen[bytes]:
        path = resolve_weights(SMOLLM2)
        options = {"port": self._port, "model": path, "alias": MODEL, "parallel": SLOTS, "batch": BATCH}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, NATIVE, *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=die_with_parent,
            )


class External(OneModel):
    """The model on that server."""

    def __init__(self, server: NativeServer) -> None:
        config = PoolConfig.model_validate({"servers": [{"url": server.url, "max_concurrent": SLOTS}]})
        super().__init__(config, Ledger(SLOTS, replica=server.url))
        self._server = server

    @classmethod
    @contextlib.asynccontextmanager
    async def running(cls, folder: Path) -> AsyncGenerator[External, None]:
        """A pool and its server, which end with the context."""
        server = NativeServer(folder)
        pool = cls(server)
        looking = asyncio.create_task(pool._look_again())
        try:
            await pool.load()
            yield pool
        finally:
            looking.cancel()
            await pool.gateway.close()
            server.kill()

    async def load(self) -> None:
        """Wait until the server serves: the ledger leases it from then on, as it does once it has a manifest."""
        await self._server.serves()
        self.ledger.find_server()

    def kill(self) -> None:
        self._server.kill()
        self._server.restart()

    async def _look_again(self) -> None:
        """As the ledger does with a server that was lost: it gets nothing more until it is seen to serve."""
        while True:
            await self.ledger.lost_server()
            await self.load()

    def held_mib(self) -> int:
        return tree_mib(self._server.process.pid)
