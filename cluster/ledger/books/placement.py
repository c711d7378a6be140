"""Where replicas stand: devices with fractions, CPUs and memory of each node, counted in whole units.

A fraction up to one lives on one device; more than one takes whole devices of one node. An *earmark* is a promise: it
takes nothing, but nobody else may take what it needs, so that a big model is not overtaken for ever by small ones
while its victims drain. Free amounts may fall below zero, when a process exists that nobody asked for or takes more
than was thought; then nothing fits on that device, or node, until it is resolved.
"""

from __future__ import annotations

from collections.abc import Iterable

from cluster.ledger.books.packing import RayBooks
from cluster.ledger.books.records import Replica
from cluster.ledger.books.shapes import UNIT, Place, Shape, conflicts, device_index, named_devices
from cluster.ledger.specs import NodeSpec

# Which part of a host's memory all replicas without a loaded engine may take together.
HOST_SHARE = 0.25


class Node:
    """The account of one machine."""

    __slots__ = (
        "cpu",
        "device_memory",
        "excused",
        "going",
        "gpu",
        "host",
        "marked",
        "memory",
        "name",
        "number",
        "present",
        "ray",
        "replicas",
        "spec",
        "tenants",
        "widest",
    )

    def __init__(self, name: str, ray_is_asked: bool = True) -> None:
        self.name = name
        # grows from one to the next in the order in which they were first heard of
        self.number = 0
        self.ray = RayBooks(ray_is_asked)
        self.spec = NodeSpec(name)
        self.present = False
        # Over budget for an honest reason: the node shrank, an engine took more than was estimated, or Ray put a
        # process elsewhere than planned.
        self.excused = False
        self.gpu: list[int] = []
        # the largest share that a device has free, promises not counted
        self.widest = 0
        self.device_memory: list[int] = []
        self.tenants: list[dict[Replica, None]] = []
        self.cpu = 0
        self.memory = 0
        # what is taken of the host's memory by what is not loaded
        self.host = 0
        self.replicas: dict[Replica, None] = {}
        # those of them whose engine serves no more
        self.going: dict[Replica, None] = {}
        self.marked: dict[int, Place] = {}

    def resize(self, spec: NodeSpec, present: bool) -> None:
        """Take a new size; what is placed stays placed, even on devices that are gone."""
        if spec == self.spec and present == self.present:
            self.excused = self.is_over()
            return
        self.widen(spec.gpus)
        self.ray.resize(self.spec.gpus, spec.gpus)
        for index in range(len(self.gpu)):
            self.gpu[index] += UNIT * ((index < spec.gpus) - (index < self.spec.gpus))
            self.device_memory[index] += spec.device_memory_mib - self.spec.device_memory_mib
        self.widest = max(self.gpu, default=0)
        self.cpu += round(spec.cpus * UNIT) - round(self.spec.cpus * UNIT)
        self.memory += spec.memory_mib - self.spec.memory_mib
        if spec.is_head != self.spec.is_head:
            for replica in self.replicas:
                replica.model.before.clear()
        self.spec = spec
        self.present = present
        self.excused = self.is_over()

    def widen(self, devices: int) -> None:
        """Open accounts for so many devices, whether the node is known to have them or not."""
        self.ray.widen(devices)
        while len(self.gpu) < devices:
            self.gpu.append(0)
            self.device_memory.append(self.spec.device_memory_mib)
            self.tenants.append({})
            self.widest = max(self.widest, 0)

    def take(self, place: Place, sign: int) -> None:
        """Take (1) or give back (-1) what a place needs."""
        shape = place.shape
        for index in place.devices:
            self.gpu[index] -= sign * shape.per_device
            self.device_memory[index] -= sign * shape.memory_per_device
        self.widest = max(self.gpu, default=0)
        self.cpu -= sign * shape.cpu
        self.memory -= sign * shape.memory
        self.ray.take(place, sign)
        self.host += sign * shape.host

    def has_host_room(self, host_mib: int) -> bool:
        """So much of the host's memory may be taken by what is not loaded, all of it together."""
        return not self.spec.host_memory_mib or host_mib <= self.spec.host_memory_mib * HOST_SHARE

    def is_over(self) -> bool:
        """More stands here than the node has."""
        return (
            any(free < 0 for free in self.gpu)
            or self.cpu < 0
            or (self.spec.memory_mib > 0 and self.memory < 0)
            or (self.spec.device_memory_mib > 0 and any(free < 0 for free in self.device_memory))
        )

    def fit(
        self, shape: Shape, hosts: set[tuple[str, int]] | None, booked: tuple[int, ...] | None = None
    ) -> Place | None:
        """The tightest place for a shape, or None. `hosts`: the devices it must share, None = any.

        `booked` is where Ray has booked its process; None if it is to be started, and Ray must have room for it, too.
        The place is where Ray books it, if it may stand there.
        """
        # A device or a node that is over its budget has nothing free; its other devices are none the worse for it.
        if not self.present:
            return None
        marks = self.marked.values()
        if shape.cpu and self.cpu - sum(mark.shape.cpu for mark in marks) < shape.cpu:
            return None
        if self.spec.memory_mib and self.memory - sum(mark.shape.memory for mark in marks) < shape.memory:
            return None
        if not shape.gpu:
            return Place(self.name, (), shape)
        is_new = booked is None
        booked = self.ray.pack(shape) if is_new else booked
        room = [(free, index) for index, free in self._rooms(shape) if hosts is None or (self.name, index) in hosts]
        if booked is None or len(room) < shape.devices:
            return None
        if booked and {index for _, index in room}.issuperset(booked):
            place = Place(self.name, booked, shape, booked)
        else:
            place = Place(self.name, tuple(sorted(index for _, index in sorted(room)[: shape.devices])), shape, booked)
        leaving = (each.place for each in self.replicas if each.claim is not None)
        return None if is_new and self.ray.breaks((mark.shape for mark in marks), leaving, place) else place

    def fit_awake(self, sleeper: Replica, shape: Shape, hosts: set[tuple[str, int]] | None) -> Place | None:
        """The place of an engine that sleeps here, once it wakes: on its own devices. None if they have no room."""
        own = {(self.name, index) for index in sleeper.place.devices}
        self.take(sleeper.place, -1)
        place = self.fit(shape, own if hosts is None else own & hosts)
        self.take(sleeper.place, 1)
        return place

    def beside_processes(self, shape: Shape, hosts: set[tuple[str, int]] | None) -> Place | None:
        """A place on shares that no process has; None if there is none. Plans, promises and estimates stand back.

        For a process that Ray started here, though it was planned elsewhere: so was, perhaps, what is planned here.
        """
        # A node that was not heard of yet has the devices, or Ray had not started it there.
        devices = self.spec.gpus if self.present else len(self.gpu) + shape.devices
        room = []
        for index in range(devices):
            tenants = [each for each in self.tenants[index] if each.uid] if index < len(self.tenants) else []
            free = UNIT - sum(each.place.shape.per_device for each in tenants)
            if free < shape.per_device or (hosts is not None and (self.name, index) not in hosts):
                continue
            if not any(conflicts(each.place.shape, shape) for each in tenants):
                scarce = index < len(self.gpu) and self.device_memory[index] < shape.memory_per_device
                room.append((scarce, free, index))
        if len(room) < shape.devices:
            return None
        return Place(self.name, tuple(sorted(index for *_, index in sorted(room)[: shape.devices])), shape)

    def is_honest(self, replica: Replica) -> bool:
        """The replica's shares are its own: it may stand there, and no other process has them or must not meet it."""
        place = replica.place
        if place.shape.only and not named_devices(self.spec, place.shape.only).issuperset(place.devices):
            return False
        for index in place.devices:
            others = [each for each in self.tenants[index] if each.uid and each is not replica]
            used = sum(each.place.shape.per_device for each in others)
            if used + place.shape.per_device > UNIT or (self.present and index >= self.spec.gpus):
                return False
            if any(conflicts(each.place.shape, place.shape) for each in others):
                return False
        return True

    def indexes(self, devices: tuple[str, ...]) -> tuple[int, ...] | None:
        """The devices that an engine process says it has, by index; None if one of them is not known."""
        found = [device_index(self.spec, each.strip()) for each in devices]
        known = sorted({each for each in found if each is not None})
        return tuple(known) if len(known) == len(found) else None

    def _rooms(self, shape: Shape) -> list[tuple[int, int]]:
        """The devices that could take one share of the shape, with what they have free."""
        rooms = []
        for index, free in enumerate(self.gpu):
            memory = self.device_memory[index]
            for mark in self.marked.values():
                if index in mark.devices:
                    free -= mark.shape.per_device
                    memory -= mark.shape.memory_per_device
            if free < shape.per_device:
                continue
            if self.spec.device_memory_mib and memory < shape.memory_per_device:
                continue
            if not any(conflicts(tenant.place.shape, shape) for tenant in self.tenants[index]):
                rooms.append((index, free))
        return rooms


def _holds(spec: NodeSpec, shape: Shape, enough: int) -> int:
    """How many of a shape an empty node holds, counted no further than `enough`."""
    count = enough
    if shape.gpu:
        if spec.device_memory_mib and shape.memory_per_device > spec.device_memory_mib:
            return 0
        gpus = len(named_devices(spec, shape.only)) if shape.only else spec.gpus
        if shape.only and not spec.device_uuids and not all(each.rpartition("/")[2].isdecimal() for each in shape.only):
            # Whether it has a device of that UUID cannot be told yet: its driver was not asked.
            gpus = spec.gpus
        share = UNIT // shape.per_device
        if spec.device_memory_mib and shape.memory_per_device:
            share = min(share, spec.device_memory_mib // shape.memory_per_device)
        count = min(count, gpus * share // shape.devices)
    if shape.cpu:
        count = min(count, round(spec.cpus * UNIT) // shape.cpu)
    if spec.memory_mib and shape.memory:
        count = min(count, spec.memory_mib // shape.memory)
    return count


class Book:
    """The accounts of all nodes. `version` grows whenever something may fit that did not fit before."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        self.seen: dict[str, NodeSpec] = {}
        self.version = 0
        self.present = 0
        self._opened = 0
        self._keeps_replicas = False
        # what the models of each sharing group are bound to, as far as they are
        self.bonds: dict[str, set[tuple[str, ...]]] = {}
        self._full: dict[Shape, int] = {}
        self._possible: dict[tuple[Shape, int], bool] = {}
        self._serial = 0

    @property
    def keeps_replicas(self) -> bool:
        """A replica stays when its engine ends, so what is to end is chosen here, and not by Serve.

        It then takes nothing worth counting of Ray's books.
        """
        return self._keeps_replicas

    @keeps_replicas.setter
    def keeps_replicas(self, keeps: bool) -> None:
        self._keeps_replicas = keeps
        for node in self.nodes.values():
            node.ray.are_asked = not keeps

    def set_nodes(self, specs: dict[str, NodeSpec]) -> None:
        for name, spec in specs.items():
            self.node(name).resize(spec, present=True)
            self.seen[name] = spec
        for name, node in list(self.nodes.items()):
            if name not in specs:
                node.resize(NodeSpec(name), present=False)
                self._forget(node)
        self.present = len(specs)
        self._possible.clear()
        self.version += 1

    def node(self, name: str) -> Node:
        """The account of a node, opened when it is first heard of."""
        found = self.nodes.get(name)
        if found is None:
            found = self.nodes[name] = Node(name, ray_is_asked=not self._keeps_replicas)
            self._opened += 1
            found.number = self._opened
        return found

    def could_ever_fit(self, shape: Shape, replicas: int = 1) -> bool:
        """False only if all nodes that were ever seen, empty, would not hold so many."""
        if not self.seen:
            return True
        known = self._possible.get((shape, replicas))
        if known is None:
            known = self._possible[shape, replicas] = self._could_hold(shape, replicas)
        return known

    def _could_hold(self, shape: Shape, replicas: int) -> bool:
        for spec in self.seen.values():
            replicas -= _holds(spec, shape, replicas)
            if replicas <= 0:
                return True
        return False

    def could_stand_on(self, node: Node, shape: Shape) -> bool:
        """A node has room for a shape if it is empty."""
        return _holds(node.spec, shape, 1) > 0

    def has_named_devices(self, shape: Shape) -> bool:
        """Some node that was ever seen has a device that the shape is bound to, if it is bound to any."""
        return not shape.only or any(named_devices(spec, shape.only) for spec in self.seen.values())

    def find(self, shape: Shape, among: Iterable[str] | None = None) -> Place | None:
        """A free place, on the node that it leaves the least room on. Remembers a failure until something changes.

        `among` are the nodes that are looked at; None = all.
        """
        if self._full.get(shape) == self.version:
            return None
        hosts = self.hosts(shape)
        best: tuple[int, int, Place] | None = None
        nodes = self.nodes.values() if among is None else self._in_order(among)
        for node in nodes:
            if shape.gpu and node.widest < shape.per_device:
                continue
            left = sum(node.gpu), node.cpu
            # To ask for a place costs ten times as much as to see that it would not be the best.
            if best is not None and left >= best[:2]:
                continue
            place = node.fit(shape, hosts)
            if place is not None:
                best = (*left, place)
        if best is None:
            if among is None:
                self._full[shape] = self.version
            return None
        return best[2]

    def _in_order(self, names: Iterable[str]) -> list[Node]:
        return sorted((self.nodes[name] for name in names if name in self.nodes), key=lambda node: node.number)

    def hosts(self, shape: Shape) -> set[tuple[str, int]] | None:
        """The devices that a shape is bound to: by its model, and by its sharing group. None if it may go anywhere.

        A group goes where all of its models may, if some are bound to devices: whichever is loaded first leaves the
        others a way to join it. Models that are bound apart can never meet; then each goes its own way.
        """
        named = self._named(shape.only) if shape.only else None
        if shape.group is None or not shape.share:
            return named
        shared = self._shared(shape)
        bonds = [self._named(each) for each in self.bonds.get(shape.group, ())]
        home = set.intersection(*bonds) if bonds else set()
        if len(home) >= max(1, shape.devices):
            return shared & home or home
        return named if named is not None else shared or None

    def _named(self, devices: tuple[str, ...]) -> set[tuple[str, int]]:
        """All devices that a model's `devices` name."""
        return {(node.name, index) for node in self.nodes.values() for index in named_devices(node.spec, devices)}

    def _shared(self, shape: Shape) -> set[tuple[str, int]]:
        """The devices where a sharing group already stands."""
        return {
            (node.name, index)
            for node in self.nodes.values()
            for index, tenants in enumerate(node.tenants)
            if any(each.place.shape.group == shape.group and each.place.shape.model != shape.model for each in tenants)
        }

    def force(self, node: str, shape: Shape, booked: tuple[int, ...] = ()) -> Place:
        """A place for a process that exists, whether there is room or not; where it fits if it does.

        `booked` is where Ray has booked it; without, where it would.
        """
        account = self.node(node)
        hosts = self.hosts(shape)
        booked = booked or account.ray.pack(shape) or ()
        place = account.fit(shape, hosts, booked) or account.beside_processes(shape, hosts)
        if place is None:
            account.widen(shape.devices)
            by_room = sorted(range(len(account.gpu)), key=lambda index: -account.gpu[index])
            place = Place(node, tuple(sorted(by_room[: shape.devices])), shape)
        account.widen(max((*place.devices, *booked), default=-1) + 1)
        return place._replace(booked=booked)

    def settle_devices(self, replica: Replica) -> bool:
        """See to it that the replica's devices are its own, before its engine is told of them; False if they cannot be.

        What was planned where a process has turned up meanwhile, or was started elsewhere, is planned anew on its node.
        They are those that Ray has booked for it, if it may stand there.
        """
        planned = replica.place
        is_honest = self.node(planned.node).is_honest(replica)
        if is_honest and planned.booked in ((), planned.devices):
            return True
        self.credit(replica)
        account, shape, hosts = self.node(planned.node), planned.shape, self.hosts(planned.shape)
        place = account.fit(shape, hosts, planned.booked)
        if is_honest and (place is None or place.devices != planned.booked):
            place = planned
        elif place is None:
            place = account.beside_processes(shape, hosts)
        if place is not None:
            account.widen(max(place.devices, default=-1) + 1)
            replica.place, replica.row = place._replace(booked=planned.booked), None
        self.take(replica)
        self.excuse(replica.place.node)
        return place is not None

    def note_going(self, replica: Replica) -> None:
        """Its engine serves no more, or does again."""
        going = self.node(replica.place.node).going
        if replica.state.is_going:
            going[replica] = None
        else:
            going.pop(replica, None)

    def move(self, replica: Replica, place: Place) -> None:
        """Book a replica on another place than before."""
        self.credit(replica)
        replica.place, replica.row = place, None
        self.take(replica)

    def rebook(self, replica: Replica, booked: tuple[int, ...]) -> None:
        """Ray has booked the process of a replica on these devices, whatever was expected."""
        place = replica.place
        if booked != place.booked and len(booked) == place.shape.devices:
            self.node(place.node).widen(max(booked, default=-1) + 1)
            self.move(replica, place._replace(booked=booked))

    def reseat(self, replica: Replica, place: Place) -> None:
        """Book a replica elsewhere than before, since that is where it is, be there room or not."""
        self.move(replica, place)
        self.excuse(place.node)

    def hold(self, place: Place, sign: int) -> None:
        """Take (1) what a place needs while more places are looked for, and give it back (-1)."""
        self.node(place.node).take(place, sign)
        self.version += sign < 0

    def take(self, replica: Replica) -> None:
        """Take the replica's place."""
        node = self.node(replica.place.node)
        node.take(replica.place, 1)
        node.replicas[replica] = None
        replica.model.before.clear()
        if replica.state.is_going:
            node.going[replica] = None
        for index in replica.place.devices:
            node.tenants[index][replica] = None

    def credit(self, replica: Replica) -> None:
        """Give the replica's place back; only ever called when its process is gone, or never was."""
        node = self.node(replica.place.node)
        node.take(replica.place, -1)
        del node.replicas[replica]
        replica.model.before.clear()
        node.going.pop(replica, None)
        for index in replica.place.devices:
            del node.tenants[index][replica]
        node.excused = node.excused and node.is_over()
        self._forget(node)
        self.version += 1

    def excuse(self, name: str) -> None:
        """Something real did not go by plan; if the node is over its budget now, it may be."""
        node = self.node(name)
        node.excused = node.excused or node.is_over()

    def mark(self, place: Place) -> int:
        """Earmark a place; the number takes it back."""
        self._serial += 1
        self.node(place.node).marked[self._serial] = place
        return self._serial

    def unmark(self, place: Place, serial: int) -> None:
        node = self.node(place.node)
        del node.marked[serial]
        self._forget(node)
        self.version += 1

    def _forget(self, node: Node) -> None:
        """Close the account of a node that is gone and empty."""
        if not node.present and not node.replicas and not node.marked:
            self.nodes.pop(node.name, None)
