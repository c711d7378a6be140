"""A thousand prompts through the pool from a job of Ray Data, with an end to how many are on their way at a time.

    RAY_ADDRESS=… python docs/thousand_prompts.py --model smollm2

Ray Data runs PROCESSES actors, each of which asks BATCH prompts at once: at most PROCESSES × BATCH wait or run
in the pool, however many prompts there are, and none is started that the reader of the answers is not ready for. They
have the class `low`: people who use the pool meanwhile go first.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import threading
import time
from typing import Any

import ray.data

from cluster.errors import PoolError
from deployments.pool_handle import PoolHandle

PROCESSES, BATCH = 2, 16


class Ask:
    """One process of the job."""

    def __init__(self, model: str, max_tokens: int) -> None:
        self._pool, self._model, self._max_tokens = PoolHandle(), model, max_tokens

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch of prompts with their answers; what failed has its error's code instead, and the others go on."""

        async def ask_all() -> list[tuple[str, int, str]]:
            return await asyncio.gather(*(self._ask(str(prompt)) for prompt in batch["prompt"]))

        answers, tokens, failures = zip(*asyncio.run(ask_all()), strict=True)
        return {**batch, "answer": list(answers), "tokens": list(tokens), "error": list(failures)}

    async def _ask(self, prompt: str) -> tuple[str, int, str]:
        fields = {"max_tokens": self._max_tokens, "temperature": 0, "priority": "low"}
        try:
            answer = await self._pool.chat_async(self._model, prompt, **fields)
        except PoolError as error:
            return "", 0, error.code
        return answer["choices"][0]["message"]["content"] or "", answer["usage"]["completion_tokens"], ""


class Watch(threading.Thread):
    """Looks five times a second how many requests of a model run or wait in the pool."""

    def __init__(self, pool: PoolHandle, model: str) -> None:
        super().__init__(daemon=True)
        self._pool, self._model = pool, model
        self.is_over = threading.Event()
        self.most_running = self.most_waiting = self.most = 0

    def run(self) -> None:
        while not self.is_over.wait(0.2):
            with contextlib.suppress(PoolError):
                row = self._pool.status().models[self._model]
                self.most_running = max(self.most_running, row.leases)
                self.most_waiting = max(self.most_waiting, row.queued)
                self.most = max(self.most, row.leases + row.queued)


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--model", default="smollm2")
    options.add_argument("--prompts", type=int, default=1000)
    options.add_argument("--max-tokens", type=int, default=24)
    given = options.parse_args()

    ray.init(log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    watch = Watch(PoolHandle(), given.model)
    watch.start()
    began = time.monotonic()
    prompts = [{"prompt": f"Write one sentence about the number {number}."} for number in range(given.prompts)]
    answers = ray.data.from_items(prompts, override_num_blocks=-(-given.prompts // BATCH)).map_batches(
        Ask,
        fn_constructor_args=(given.model, given.max_tokens),
        batch_size=BATCH,
        concurrency=PROCESSES,
        num_cpus=0.5,
    )
    count = tokens = 0
    failures: dict[str, int] = {}
    for row in answers.iter_rows():
        count += 1
        tokens += row["tokens"]
        if row["error"]:
            failures[row["error"]] = failures.get(row["error"], 0) + 1
        elif count == 1:
            print(f"{row['prompt']} -> {row['answer']!r}")
        if count % max(1, given.prompts // 5) == 0:
            print(f"{count} answers after {time.monotonic() - began:.1f} s", flush=True)
    took_s = time.monotonic() - began
    watch.is_over.set()
    watch.join()
    print(f"{count} prompts, {tokens} tokens in {took_s:.1f} s; failed: {failures or 'none'}")
    print(f"at most {watch.most} requests at a time: {watch.most_running} ran, {watch.most_waiting} waited")


if __name__ == "__main__":
    main()
