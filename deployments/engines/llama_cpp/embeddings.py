"""Embeddings: what a prompt is to the model, without an answer to it.

A prompt's embedding is the mean of its tokens' hidden states behind the last layer, of length one: what llama-server
gives with `--pooling mean`.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import AsyncGenerator, Sequence

import numpy as np
import numpy.typing as npt

from deployments.engines.chat.generation import Generation, Mailbox
from deployments.engines.chat.prepare import Prepared
from deployments.engines.protocol import Call, Report


class EmbeddingAnswer:
    """The answer to one call for embeddings. Create it when the call arrives, `begin` once prepared, then `whole`."""

    def __init__(self, call: Call, model_id: str) -> None:
        self._call = call
        self._entered_at = time.perf_counter()
        self._model = call.json.get("model") or model_id
        self.report = Report()

    def begin(self, prepared: Prepared, generations: Sequence[Generation], mailbox: Mailbox) -> None:
        self._prepared, self._generations, self._mailbox = prepared, generations, mailbox
        self.report.tokenize_ms = (time.perf_counter() - self._entered_at) * 1e3

    async def whole(self) -> AsyncGenerator[bytes, None]:
        """One JSON body. Raises the `PoolError` of a failed sequence."""
        rows: dict[int, npt.NDArray[np.float32]] = {}
        while len(rows) < len(self._generations):
            for delta in await self._mailbox.take():
                if delta.error is not None:
                    raise delta.error
                assert delta.embedding is not None, "a prompt that has ended has its embedding"
                rows[delta.index] = _normalised(delta.embedding)
        in_base64 = self._call.json.get("encoding_format") == "base64"
        data = [
            {
                "object": "embedding",
                "index": index,
                "embedding": _encoded(rows[index]) if in_base64 else rows[index].tolist(),
            }
            for index in sorted(rows)
        ]
        tokens = self._prepared.prompt_tokens
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        self.update_report()
        yield json.dumps({"object": "list", "data": data, "model": str(self._model), "usage": usage}).encode()

    def update_report(self) -> None:
        """Bring the report up to date."""
        self.report.prompt_tokens, self.report.cached_tokens, self.report.output_tokens = (
            self._prepared.prompt_tokens,
            0,
            0,
        )
        self.report.total_ms = (time.perf_counter() - self._entered_at) * 1e3


def _normalised(vector: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The vector with length one. The mean and the sum of the hidden states point the same way."""
    length = float(np.linalg.norm(vector))
    return vector / length if length else vector


def _encoded(vector: npt.NDArray[np.float32]) -> str:
    """Little-endian floats in base64, as OpenAI's client reads them."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
