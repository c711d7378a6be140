"""What a holder says that it holds is what the ledger has for it afterwards: a lost message leaks nothing."""

from __future__ import annotations

import pytest

from cluster.ledger.events import (
    HolderAnnounced,
    HolderDied,
    LeaseReannounced,
    LeaseReleased,
    ReplicaStarted,
    RequestArrived,
    RequestCancelled,
    Ticked,
)
from cluster.ledger.handlers import holders
from cluster.ledger.specs import ServerSpec
from tests.unit.ledger import server_desk
from tests.unit.ledger.desk import Desk, model


def leases(desk: Desk) -> int:
    return int(desk.ledger.snapshot().leases)


def queued(desk: Desk) -> int:
    return int(desk.ledger.snapshot().queued)


def loaded(**more: object) -> Desk:
    """Two slots, both of them leased to `r1` and `r2` of holder `h`."""
    desk = Desk(model("a", slots=2, **more))
    desk.arrive("r1", "a")
    desk.arrive("r2", "a")
    assert desk.boot("a", "u") == ["grant r1 u", "grant r2 u"]
    return desk


def test_a_lease_whose_release_was_lost_is_released() -> None:
    desk = loaded()
    desk.arrive("r3", "a", holder="other")
    out = desk.tell(HolderAnnounced("h", (("r2", desk.grants["r2"].generation),), ()))
    assert out == ["grant r3 u"]
    assert leases(desk) == 2
    # The release that was only late is stale now, and changes nothing.
    assert desk.release("r1") == []


def test_a_grant_under_way_is_not_released() -> None:
    """The holder wrote its list while the grant was on its way: it lists the request as waiting."""
    desk = loaded()
    assert desk.tell(HolderAnnounced("h", (("r1", desk.grants["r1"].generation),), ("r2",))) == []
    assert leases(desk) == 2


def test_a_lease_under_another_number_is_not_the_one_it_holds() -> None:
    desk = loaded()
    desk.tell(HolderAnnounced("h", (("r1", 99), ("r2", desk.grants["r2"].generation)), ()))
    assert leases(desk) == 1


def test_a_waiter_whose_cancellation_was_lost_is_cancelled_and_stays_so() -> None:
    desk = loaded()
    desk.arrive("r3", "a")
    desk.arrive("r4", "a")
    held = tuple((each, desk.grants[each].generation) for each in ("r1", "r2"))
    assert desk.tell(HolderAnnounced("h", held, ("r4",))) == []
    assert queued(desk) == 1
    assert desk.release("r1") == ["grant r4 u"]
    # A second copy of its arrival comes too late.
    assert desk.arrive("r3", "a") == ["reject r3 BackendUnavailable"]


def test_what_only_the_holder_knows_is_ignored() -> None:
    desk = loaded()
    held = tuple((each, desk.grants[each].generation) for each in ("r1", "r2"))
    assert desk.tell(HolderAnnounced("h", (*held, ("r9", 12)), ("r8",))) == []
    assert (leases(desk), queued(desk)) == (2, 0)


def test_other_holders_keep_what_they_have() -> None:
    desk = loaded()
    desk.arrive("r3", "a", holder="other")
    desk.tell(HolderAnnounced("other", (), ("r3",)))
    assert (leases(desk), queued(desk)) == (2, 1)


def test_a_dead_holder_announces_nothing() -> None:
    desk = loaded()
    desk.tell(HolderDied("h"))
    assert desk.tell(HolderAnnounced("h", (("r1", 1),), ())) == []
    assert leases(desk) == 0


def test_within_the_recovery_window_the_newer_list_counts() -> None:
    """Its replica has not come yet; the lease of the first list has ended before the second."""
    desk = Desk(model("a", slots=2), recovering_until=2.0)
    desk.tell(LeaseReannounced("r1", "h", "a", "u", 4), LeaseReannounced("r2", "h", "a", "u", 5))
    desk.tell(HolderAnnounced("h", (("r2", 5),), ()))
    desk.tell(ReplicaStarted("a", "u", "n", loading=True))
    desk.boot("a", "u")
    assert leases(desk) == 1


def test_the_announcement_of_a_lease_that_was_reconciled_away_changes_nothing() -> None:
    desk = Desk(model("a", slots=2), recovering_until=2.0)
    desk.boot("a", "u")
    desk.tell(LeaseReannounced("r1", "h", "a", "u", 4))
    assert leases(desk) == 1
    desk.tell(HolderAnnounced("h", (), ()))
    desk.tell(LeaseReannounced("r1", "h", "a", "u", 4))
    assert leases(desk) == 0


def test_leases_on_servers_are_reconciled_too() -> None:
    desk = server_desk.Desk(ServerSpec(server_desk.ONE, 3), manifests={server_desk.ONE: "m"})
    for each in ("r1", "r2", "r3"):
        desk.ask(each, "m")
    desk.post(HolderAnnounced("h", (("r1", desk.held["r1"].generation),), ("r2",)))
    assert desk.server().active_requests == 2
    assert desk.post(LeaseReleased("r3", desk.held["r3"].generation)) == []


@pytest.mark.parametrize(
    "event",
    [
        HolderAnnounced("h", (("r1",),), ()),  # type: ignore[arg-type]
        HolderAnnounced("h", (("r1", "1"),), ()),  # type: ignore[arg-type]
        HolderAnnounced("h", ("r1",), ()),  # type: ignore[arg-type]
        HolderAnnounced("h", (), (1,)),  # type: ignore[arg-type]
        HolderAnnounced("h", [], ()),  # type: ignore[arg-type]
    ],
)
def test_a_malformed_list_releases_nothing(event: HolderAnnounced) -> None:
    desk = loaded()
    assert desk.tell(event) == []
    assert leases(desk) == 2


def test_a_cancelled_request_that_was_granted_is_not_reconciled_twice() -> None:
    desk = loaded()
    desk.tell(RequestCancelled("r1"), HolderAnnounced("h", (("r2", desk.grants["r2"].generation),), ()), Ticked())
    assert leases(desk) == 1
    assert desk.tell(RequestArrived("r1", "h", "a", 2, 50.0)) == ["reject r1 BackendUnavailable"]


# --- a holder that dies -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recovering", [False, True])
def test_a_holder_of_very_much_is_let_go_in_parts(monkeypatch: pytest.MonkeyPatch, recovering: bool) -> None:
    """No event takes long; what is left is due at once, and nobody else has to wait for it but for a free slot."""
    monkeypatch.setattr(holders, "MAX_ENDED", 2)
    desk = loaded()
    for number in range(3, 7):
        desk.arrive(f"r{number}", "a")
    desk.arrive("mine", "a", holder="other")
    if recovering:
        desk.ledger._pool.recovering_until = desk.now + 60.0
    desk.tell(HolderDied("h"))
    assert (leases(desk), queued(desk)) == (2, 3)
    assert desk.ledger.next_deadline() == desk.now
    desk.tell(Ticked())
    assert (leases(desk), queued(desk)) == (2, 1)
    out = desk.tell(Ticked())
    assert out == ([] if recovering else ["grant mine u"])
    assert (leases(desk), queued(desk)) == ((0, 1) if recovering else (1, 0))
    deadline = desk.ledger.next_deadline()
    assert deadline is None or deadline > desk.now


def test_what_a_dead_holder_was_granted_or_gave_up_meanwhile_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holders, "MAX_ENDED", 1)
    desk = loaded()
    for number in range(3, 8):
        desk.arrive(f"r{number}", "a", holder="dying")
    desk.arrive("mine", "a", holder="other")
    # r3 ends with the holder, and one of the others with each event from now on, before that is looked at.
    desk.tell(HolderDied("dying"))
    assert desk.release("r1") == ["grant r5 u"], "r4 has just ended, and r5 is the next in line"
    assert desk.tell(RequestCancelled("r7")) == ["grant r6 u"], "r5 has ended, and r6 is the next"
    assert desk.tell(Ticked()) == ["grant mine u"]
    assert desk.tell(Ticked()) == [], "r7 has left already"
    assert (leases(desk), queued(desk)) == (2, 0)
