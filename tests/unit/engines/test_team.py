"""The team of threads gets smaller while they wait for cores, and is tried whole again."""

from __future__ import annotations

import pytest

from deployments.engines.llama_cpp.team import FIRST_RETRY_S, LONGEST_RETRY_S, Team, waited_for_cores_s


class Machine:
    """A clock and the kernel's figure, which tests move."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waited: float | None = 0.0

    def team(self, threads: int) -> Team:
        return Team(threads, lambda: self.waited, lambda: self.now)

    def run(self, team: Team, crowding: float, seconds: float = 0.2) -> bool:
        """Let a batch of `seconds` end, in which the threads waited for `crowding` cores."""
        self.now += seconds
        if self.waited is not None:
            self.waited += crowding * seconds
        return team.changed()


def test_a_calm_machine_has_the_whole_team():
    machine = Machine()
    team = machine.team(2)
    assert not any(machine.run(team, 0.3) for _ in range(100))
    assert team.size == 2


def test_a_neighbour_costs_one_thread_and_two_cost_two():
    machine = Machine()
    small, large = machine.team(2), machine.team(16)
    assert machine.run(small, 1.0)
    assert small.size == 1
    machine.run(large, 2.1)
    assert large.size == 14


def test_one_thread_is_always_left():
    machine = Machine()
    team = machine.team(2)
    machine.run(team, 5.0)
    assert team.size == 1


def test_short_batches_are_judged_together():
    machine = Machine()
    team = machine.team(2)
    assert not machine.run(team, 1.0, seconds=0.06)
    assert machine.run(team, 1.0, seconds=0.06)


def test_the_whole_team_is_tried_again_later_and_later_while_the_neighbour_stays():
    machine = Machine()
    team = machine.team(2)
    small = []
    for _ in range(6):
        assert machine.run(team, 1.0)
        began = machine.now
        while not machine.run(team, 0.0):
            assert team.size == 1
        small.append(machine.now - began)
    assert small[0] == pytest.approx(FIRST_RETRY_S, abs=0.2)
    assert small[1] == pytest.approx(2 * FIRST_RETRY_S, abs=0.2)
    assert small[-1] == pytest.approx(LONGEST_RETRY_S, abs=0.2)


def test_after_a_calm_window_the_first_retry_is_soon_again():
    machine = Machine()
    team = machine.team(2)
    for _ in range(3):
        machine.run(team, 1.0)
        while not machine.run(team, 0.0):
            pass
    machine.run(team, 0.0)
    machine.run(team, 1.0)
    began = machine.now
    while not machine.run(team, 0.0):
        pass
    assert machine.now - began == pytest.approx(FIRST_RETRY_S, abs=0.2)


def test_a_pause_of_the_requests_tells_nothing():
    machine = Machine()
    team = machine.team(2)
    assert not machine.run(team, 1.0, seconds=60.0)
    assert team.size == 2


@pytest.mark.parametrize("gone", ["at the start", "later"])
def test_without_the_kernels_figures_the_team_is_whole(gone: str):
    machine = Machine()
    if gone == "at the start":
        machine.waited = None
    team = machine.team(2)
    machine.waited = None
    assert not any(machine.run(team, 1.0) for _ in range(3))
    assert team.size == 2


def test_one_thread_has_nobody_to_wait_for():
    machine = Machine()
    team = machine.team(1)
    assert not machine.run(team, 1.0)


def test_the_kernel_tells_how_long_threads_had_no_core():
    waited = waited_for_cores_s()
    assert waited is None or waited > 0.0
