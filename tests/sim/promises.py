"""What an onlooker may demand of the policy, in a world where everybody does as told.

He sees requests, processes and desired counts, and knows the configuration. Each promise is judged after every event.
"""

from __future__ import annotations

from cluster.ledger.specs import PoolSpec
from tests.sim.world import Process, Request, World


def rank(spec: PoolSpec, request: Request) -> float:
    """A request's place in line: lower goes first."""
    return request.arrived + (request.priority - 1) * spec.ageing_s


class Judge:
    """Looks at a world after every step (`World.after_step`)."""

    def __init__(self) -> None:
        self.desired: dict[str, int] = {}
        # the models that had a process after the step before
        self.alive: set[str] = set()

    def __call__(self, world: World) -> None:
        world.scheduler.check()  # type: ignore[attr-defined]
        before, self.desired = self.desired, dict(world.desired)
        served = self.alive | {each for each, count in world.desired.items() if count}
        self.alive = {each.model for each in world.processes.values()}
        waiting = [each for each in world.requests.values() if each.granted is None and not each.done]
        if not waiting:
            return
        for model, count in world.desired.items():
            if count > before.get(model, 0):
                self._judge_start(world, model, [each for each in waiting if each.model not in served - {model}])
        self._judge_idle(world, waiting)

    def _judge_start(self, world: World, model: str, waiting: list[Request]) -> None:
        """Nobody's place goes to those who stand behind him in line. Whose own replica just left has had his."""
        spec, need = world.spec, world.spec.models[model].num_gpus
        behind = min((rank(spec, each) for each in waiting if each.model == model), default=float("inf"))
        for each in waiting:
            if spec.models[each.model].num_gpus <= need:
                assert rank(spec, each) >= behind, f"{world.now}: {model} starts, and {each} stands before its waiters"

    def _judge_idle(self, world: World, waiting: list[Request]) -> None:
        """Where nothing starts or stops, and one model waits for a device, nobody else has an idle one to give."""
        names = {each.model for each in waiting}
        alive = list(world.processes.values())
        if len(names) > 1 or any(each.state != "ready" for each in alive):
            return
        counts = {name: sum(each.model == name for each in alive) for name in world.desired}
        (name,) = names
        if counts != world.desired or counts.get(name):
            return
        need = world.spec.models[name].num_gpus
        idle = [each for each in alive if self._is_spare(each, alive, world) and not each.streams]
        assert all(world.spec.models[each.model].num_gpus < need for each in idle), (
            f"{world.now}: {name} waits beside {idle}"
        )

    def _is_spare(self, process: Process, alive: list[Process], world: World) -> bool:
        """Serve would stop it before the others of its model, and it is not kept."""
        newest = max(each.number for each in alive if each.model == process.model)
        spec = world.spec.models[process.model]
        return process.number == newest and not spec.pinned and not spec.min_replicas
