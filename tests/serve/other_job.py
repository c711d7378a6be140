"""Another Ray job, as a process of its own: it uses the pool through its handle; run by `test_pool_handle.py`.

It says in JSON what it got, a line for each step, and then holds a lease and reads a stream until it is killed.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import ray

from cluster.errors import ModelNotFound
from deployments.pool_handle import PoolHandle


def say(what: Any) -> None:
    print(json.dumps(what), flush=True)


@ray.remote(num_cpus=0)
def ask(pool: PoolHandle, text: str) -> str | None:
    return pool.chat("quick", text)["choices"][0]["message"]["content"]


def main(address: str) -> None:
    ray.init(address=address, namespace="other", log_to_driver=False)
    pool = PoolHandle()
    say(pool.chat("quick", "hi"))
    say([chunk["choices"][0]["delta"].get("content") for chunk in pool.stream("quick", "hi", max_tokens=3)])
    say(pool.embed("quick", ["one", "two"], dimensions=4))
    say(ray.get([ask.remote(pool, text) for text in ("a", "b")]))
    say(sorted(pool.status().models))
    try:
        pool.chat("nope", "hi")
    except ModelNotFound as error:
        say(error.body())
    with pool.acquire("single", hold_s=300) as lease:
        stream = lease.stream("hi")
        first = next(stream)
        say([lease.model, lease.slots, first["choices"][0]["delta"].get("content")])
        time.sleep(600)


if __name__ == "__main__":
    main(sys.argv[1])
