"""Which node and which devices Ray gives a start, on two nodes in one machine; run by `test_devices.py`."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.ledger.specs import ModelSpec, NodeSpec
from tests.sim.ray import choices
from tests.unit.raylet import wait_until

SHARES = (0.3, 0.4, 0.5, 0.6, 1.0)
MODELS = {f"m{share}": ModelSpec(f"m{share}", num_gpus=share) for share in SHARES}


@dataclass(eq=False)
class Started:
    """A process and what Ray has booked for it."""

    actor: Any
    model: str
    node: str
    booked: tuple[int, ...]


@pytest.fixture(scope="module")
def nodes() -> Iterator[dict[str, NodeSpec]]:
    home = tempfile.mkdtemp(prefix="sp-")
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(Path(home) / "token")
    Path(home, "token").write_text("0" * 64)
    import ray
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 2, "num_gpus": 2, "include_dashboard": False, "temp_dir": home}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        cluster.add_node(num_cpus=2, num_gpus=1)
        ray.init(address=cluster.address, log_to_driver=False)
        wait_until(lambda: sum(node["Alive"] for node in ray.nodes()) == 2)
        yield {
            node["NodeID"]: NodeSpec(node["NodeID"], gpus=int(node["Resources"]["GPU"]), cpus=2.0)
            for node in ray.nodes()
        }
    finally:
        ray.shutdown()
        cluster.shutdown()
        shutil.rmtree(home, ignore_errors=True)


class Booked:
    """A process that says where it is, and what Ray has booked for it."""

    def place(self) -> tuple[str, tuple[int, ...]]:
        from cluster import effects

        return effects.this_actor()[1], effects.booked_devices()


def test_a_start_gets_any_node_where_rays_books_have_room(nodes: dict[str, NodeSpec]):
    """Serve asks Ray to spread; fractions come and go."""
    import ray

    rng = random.Random(3)
    alive: list[Started] = []
    used = set()
    for _ in range(14):
        able = [each for each in MODELS.values() if choices(each, nodes, alive, MODELS)]
        if alive and (not able or rng.random() < 0.35):
            gone = alive.pop(rng.randrange(len(alive)))
            ray.kill(gone.actor)
            free = sum(node.gpus for node in nodes.values()) - sum(MODELS[each.model].num_gpus for each in alive)
            wait_until(lambda free=free: abs(ray.available_resources().get("GPU", 0.0) - free) < 1e-6)  # type: ignore[misc]
            continue
        model = rng.choice(able)
        options = {"num_cpus": 0, "num_gpus": model.num_gpus, "scheduling_strategy": "SPREAD"}
        actor = ray.remote(Booked).options(**options).remote()
        node, booked = ray.get(actor.place.remote())
        assert choices(model, nodes, alive, MODELS)[node] == booked
        alive.append(Started(actor, model.name, node, booked))
        used.add(node)
    assert used == set(nodes)
