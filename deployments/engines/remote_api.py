"""A model behind a remote API (`backend: openai_compatible`): nothing runs here, and every call is somebody's bill.

One attempt is made unless the configuration says otherwise, and what may have been answered already is not asked again.
Who may come here, and within which budget, is decided before there is a lease (`deployments/requests.py`,
`deployments/limits.py`).
"""

from __future__ import annotations

from urllib.parse import urlsplit

from cluster.config import RemoteModel
from cluster.errors import InvalidRequest
from deployments.engines.openai_upstream import Target, Upstreams, key_of
from deployments.engines.protocol import Call, EngineInfo, Progress, Reply
from deployments.engines.upstream_errors import Blame
from deployments.schemas import CHAT

PATHS = frozenset({CHAT})


class RemoteApi:
    """The engine of a remote model. A load checks nothing but the configuration, and costs nothing."""

    def __init__(self, model_id: str, model: RemoteModel) -> None:
        self._id, self._model = model_id, model
        base = model.remote_base_url.rstrip("/")
        self._api = base if urlsplit(base).path else f"{base}/v1"
        self._upstreams = Upstreams()

    async def load(self, progress: Progress) -> None:
        progress(1.0)

    def info(self) -> EngineInfo:
        return EngineInfo(paths=PATHS, url=self._model.remote_base_url)

    async def call(self, call: Call) -> Reply:
        if call.path not in PATHS or isinstance(call.body, bytes):
            raise InvalidRequest(f"the remote API of {self._id} does not serve {call.path}")
        return await self._upstreams.call(self._target(), call)

    async def unload(self) -> None:
        await self._upstreams.close()

    def _target(self) -> Target:
        model, name = self._model, f"the remote API of {self._id}"
        blame = Blame(name, key_of(model.remote_api_key_env, name), is_retried=False)
        return Target(
            self._api,
            blame,
            api=self._api,
            model=model.remote_model or self._id,
            fields={"thinking": {"type": model.remote_thinking}} if model.remote_thinking else {},
            silence_s=model.remote_timeout_s,
            retries=model.remote_max_retries,
        )
