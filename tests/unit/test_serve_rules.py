"""The rules by which Ray Serve acts on the counts that it is given: the installed Serve beside ours."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from types import SimpleNamespace

import pytest
from ray._common.constants import HEAD_NODE_RESOURCE_NAME
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve._private.deployment_scheduler import DeploymentScheduler, ReplicaSchedulingRequest

from app.build import replicas
from cluster import effects
from cluster.config import load_config
from cluster.ledger.books import stops
from cluster.ledger.books.placement import Book
from cluster.ledger.books.records import Model, Replica
from cluster.ledger.books.shapes import Place
from cluster.ledger.rules import sleepers
from cluster.ledger.specs import ModelSpec, NodeSpec
from tests.sim.serve import may_stop

NODES = ("n0", "n1", "n2", "n3")
OURS, OTHER = DeploymentID("ours"), DeploymentID("other")


def test_the_head_node_is_known_by_what_ray_declares_there() -> None:
    assert effects._HEAD == HEAD_NODE_RESOURCE_NAME


def serve(running: list[SimpleNamespace], others: Counter[str], head: str | None) -> SimpleNamespace:
    """As much of Serve's scheduler as its choice looks at."""
    scheduler = SimpleNamespace(
        _pending_replicas=defaultdict(dict),
        _launching_replicas=defaultdict(dict),
        _recovering_replicas=defaultdict(set),
        _running_replicas=defaultdict(dict),
        _deployments={OURS: SimpleNamespace(label_selector=None, bundle_label_selector=None)},
        _cluster_node_info_cache=SimpleNamespace(get_node_labels=lambda node: {}),
        _head_node_id=head,
    )
    scheduler._get_node_to_running_replicas = lambda: DeploymentScheduler._get_node_to_running_replicas(scheduler)
    for index, node in enumerate(others.elements()):
        scheduler._running_replicas[OTHER][ReplicaID(f"o{index}", OTHER)] = node
    for each in running:
        if each.node:
            DeploymentScheduler.on_replica_running(scheduler, ReplicaID(each.uid, OURS), each.node)
        else:
            scheduler._launching_replicas[OURS][ReplicaID(each.uid, OURS)] = None
    return scheduler


def stopped(scheduler: SimpleNamespace, count: int = 1) -> set[str]:
    return {each.unique_id for each in DeploymentScheduler._get_replicas_to_stop(scheduler, OURS, count)}


def draw(rng: random.Random) -> tuple[list[SimpleNamespace], Counter[str], str | None]:
    starting = rng.random() < 0.2
    running = [
        SimpleNamespace(uid=f"r{number}", number=number, node="" if starting and number > 2 else rng.choice(NODES))
        for number in range(rng.randint(1, 5))
    ]
    return running, Counter(rng.choices(NODES, k=rng.randint(0, 6))), rng.choice((None, "n0", "n1"))


@pytest.mark.parametrize("seed", range(300))
def test_serve_stops_what_the_simulation_says(seed: int) -> None:
    running, others, head = draw(random.Random(seed))
    everywhere = others + Counter(each.node for each in running if each.node)
    assert stopped(serve(running, others, head)) <= {each.uid for each in may_stop(running, everywhere, head)}


@pytest.mark.parametrize("seed", range(300))
def test_what_the_ledger_is_certain_of_serve_stops(seed: int) -> None:
    """Of any wish the ledger grants what Serve stops for certain, and Serve, asked for so many, stops just that."""
    rng = random.Random(seed)
    running, others, head = draw(rng)
    book = Book()
    book.set_nodes({name: NodeSpec(name, gpus=9, is_head=name == head) for name in NODES})
    model = Model(ModelSpec("ours"), 0.0)
    for each in running:
        replica = Replica(model, Place(each.node or "n0", (), model.shape), each.number, 0.0)
        if each.node:
            replica.uid, replica.started_at = each.uid, float(each.number)
        model.replicas[replica] = None
    model.sort_by_age()
    for replica in model.replicas:
        group = [replica, *stops.before(book, replica)]
        wish = [*group, *rng.sample(list(model.replicas), k=rng.randint(0, len(model.replicas)))]
        sure = stops.certain(book, model, wish)
        assert set(group) <= set(sure) <= set(wish)
        for asked in (group, sure):
            running_ones = {each.uid for each in asked if each.uid is not None}
            gone = stopped(serve(running, others, head), len(asked))
            assert len(gone) == len(asked)
            assert running_ones == gone & {each.uid for each in running if each.node}


def test_serve_leaves_the_choice_of_a_node_to_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the ledger's plan of a node is no more than that, and what starts elsewhere is planned anew."""
    asked: list[dict[str, object]] = []

    class Actor:
        def options(self, **options: object) -> SimpleNamespace:
            asked.append(options)
            return SimpleNamespace(remote=lambda *_: None)

    one = ReplicaID("r1", OURS)
    request = ReplicaSchedulingRequest(one, Actor(), {}, {"num_gpus": 0.5}, (), lambda *_, **__: None)  # type: ignore[arg-type]
    scheduler = SimpleNamespace(_pending_replicas={OURS: {one: request}}, _on_replica_launching=lambda *_, **__: None)
    scheduler._schedule_replica = lambda **more: DeploymentScheduler._schedule_replica(scheduler, **more)
    DeploymentScheduler._schedule_with_spread_strategy(scheduler)
    assert asked == [{"scheduling_strategy": "SPREAD", "num_gpus": 0.5}]
    assert not DeploymentScheduler._use_pack_strategy(SimpleNamespace(_deployments={}))


def test_serves_own_bound_allows_one_replica_on_each_node() -> None:
    """Where replicas stay, the ledger may want one on each node, however few a model may have loaded at once."""
    config = load_config({"models": {"a": {"backend": "fake", "num_gpus": 1}}, "max_asleep": 3}, environ={})
    book = Book()
    book.set_nodes({f"n{index}": NodeSpec(f"n{index}", gpus=1) for index in range(100)})
    wanted = sleepers.most(SimpleNamespace(book=book), Model(config.spec().models["a"], 0.0))  # type: ignore[arg-type]
    deployment = replicas(config, "a")._bound_deployment
    assert deployment._deployment_config.autoscaling_config.max_replicas >= wanted == 100
