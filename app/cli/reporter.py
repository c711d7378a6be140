"""Progress on the terminal while a pool starts, and what to type once it is ready."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from cluster.config import PoolConfig


class Reporter:
    """Says on the terminal how far the models are, and what to type once the pool is ready. Runs in a thread.

    `failure` is set, and the thread ends, when Serve cannot deploy the pool at all.
    """

    def __init__(self, url: str, pool: PoolConfig, context: Any) -> None:
        self._url = url
        self._pool = pool
        self._context = context
        self._said: set[str] = set()
        self.failure: str | None = None

    def run(self) -> None:
        """Watch the pool until it is ready."""
        started = time.monotonic()
        with httpx.Client(base_url=self._url, timeout=5.0) as client:
            while True:
                try:
                    ready = client.get("/ready")
                    if ready.status_code == 200:
                        break
                    if self._pool.api_keys:
                        # What it loads is for those with a key, and here are only digests.
                        self._once(f"Waiting: {ready.json()['reason']}")
                    else:
                        self._show(client.get("/v1/status").json()["ledger"])
                except (httpx.HTTPError, ValueError, KeyError):
                    self._once("Starting the endpoint …")
                    if (failure := deploy_failure()) is not None:
                        self.failure = failure
                        return
                time.sleep(0.3)
        self._once(f"Ready after {time.monotonic() - started:.1f} s.")
        self._say_what_next()

    def _show(self, ledger: dict[str, Any]) -> None:
        for replica in ledger["replicas"]:
            if replica["state"] == "LOADING":
                self._once(f"Loading {replica['model']} … {replica.get('progress', 0):.0%}")
        for name, model in ledger["models"].items():
            if model["last_error"]:
                self._once(f"{name} failed: {model['last_error'].strip().partition(chr(10))[0]}")

    def _once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            print(text, flush=True)

    def _say_what_next(self) -> None:
        model = self._pool.default_model or next(iter(self._pool.models), "MODEL")
        body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "What is gravity?"}}]}}'
        key = " -H 'Authorization: Bearer KEY'" if self._pool.api_keys else ""
        dashboard = self._context.dashboard_url
        print(
            f"\nSlotpool serves {len(self._pool.models)} model(s) at {self._url}\n\n"
            f"  curl {self._url}/v1/chat/completions -H 'Content-Type: application/json'{key} \\\n    -d '{body}'\n\n"
            f"  The status page:     {self._url}/ui\n"
            f"  Any OpenAI client:   base_url={self._url}/v1{', api_key=KEY' if key else ''}\n"
            f"  Another Ray job:     RAY_AUTH_MODE=token RAY_ADDRESS={self._context.address_info['gcs_address']}\n"
            + (f"  The Ray dashboard:   http://{dashboard}, its token: {token_command()}\n" if dashboard else "")
            + "  Stop:                Ctrl-C\n",
            flush=True,
        )


def token_command() -> str:
    """How to print the token that Ray's dashboard asks for, with the `ray` of this environment."""
    ray = Path(sys.executable).with_name("ray")
    with contextlib.suppress(ValueError):
        ray = ray.relative_to(Path.cwd())
    return f"{ray} get-auth-token"


def deploy_failure() -> str | None:
    """Why Serve cannot deploy the pool, in one line, or None while it may still succeed."""
    from ray import serve

    from cluster import effects

    with contextlib.suppress(Exception):
        application = serve.status().applications.get(effects.APP_NAME)
        if application is not None and application.status == "DEPLOY_FAILED":
            lines = [line for line in application.message.splitlines() if line.strip()]
            return f"Serve cannot deploy the pool: {lines[-1].strip() if lines else 'it does not say why'}"
    return None
