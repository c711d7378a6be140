"""The store of saved conversations: what is found, what goes when it is full, and what no broken file may do."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.config.store import KvStoreConfig
from cluster.home import MEMORY, home_of, memory_folder
from deployments.kv_store import places as placed
from deployments.kv_store.entry import SUFFIX
from deployments.kv_store.folder import Folder, NoRoom
from deployments.kv_store.places import DiskCopy, Places, copy_to_disk, places
from deployments.kv_store.store import KvStore
from tests.unit.raylet import started_raylet, wait_until

ONE, OTHER = b"1" * 32, b"2" * 32
MIB = 1 << 20


def kept(path: Path, mib: float = 64.0, disk: Path | None = None) -> Places:
    for folder in filter(None, (path, disk)):
        folder.mkdir(exist_ok=True)
    return Places(str(path), int(mib * MIB), str(disk or ""), int(mib * MIB))


def save(store: KvStore, tokens: list[int], size: int = 1000, model: bytes = ONE, byte: int | None = None) -> int:
    """Save a sequence, whose state is one byte repeated: by default its first token."""

    def fill(memory: memoryview) -> None:
        memory[:] = bytes([tokens[0] % 256 if byte is None else byte]) * len(memory)

    return store.save(model, tokens, size, fill, time.monotonic() + 10)


def found(store: KvStore, prompt: list[int], more_than: int = 0, model: bytes = ONE) -> tuple[list[int], int] | None:
    saved = store.find(model, prompt, more_than)
    if saved is None:
        return None
    assert bytes(saved.state) == bytes([saved.tokens[0] % 256]) * len(saved.state)
    return saved.tokens, saved.common


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{SUFFIX}"))


LONG = list(range(7, 507))


def test_the_longest_common_beginning_is_found(tmp_path: Path):
    store = KvStore(kept(tmp_path))
    assert save(store, LONG) > 1000
    save(store, [7, 8, 9, *range(1000, 1300)])
    save(store, [500] * 40)
    assert found(store, [*LONG[:400], 1, 2]) == (LONG, 400)
    assert found(store, [*LONG, 1, 2]) == (LONG, 500)
    assert found(store, [7, 8, 9, 1000, 1001]) == ([7, 8, 9, *range(1000, 1300)], 5)
    assert found(store, [500]) == ([500] * 40, 1)
    assert found(store, LONG, more_than=500) is None
    assert found(store, [1, 2, 3]) is None
    assert found(KvStore(kept(tmp_path)), LONG) == (LONG, 500), "another process finds it, too"
    assert {path.stat().st_mode & 0o777 for path in entries(tmp_path)} == {0o600}


def test_models_never_mix(tmp_path: Path):
    store = KvStore(kept(tmp_path))
    save(store, LONG, model=ONE)
    assert found(store, LONG, model=OTHER) is None
    save(store, LONG, model=OTHER)
    entry = next(path for path in entries(tmp_path) if path.name.startswith(OTHER.hex()[:8]))
    entry.rename(tmp_path / f"{ONE.hex()[:24]}-0{SUFFIX}")
    assert found(store, LONG, model=OTHER) is None
    assert found(store, LONG, model=ONE) == (LONG, 500)
    assert len(entries(tmp_path)) == 1, "what has another's name is removed"


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:10],
        lambda data: data[:100],
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: os.urandom(len(data)),
        lambda data: data[:60] + bytes([data[60] ^ 1]) + data[61:],
        lambda data: data[:-5] + bytes([data[-5] ^ 1]) + data[-4:],
        lambda data: b"\0" * len(data),
        lambda data: b"slotkv1\n" + b"\xff" * 1000,
    ],
)
def test_a_broken_entry_is_a_miss_and_goes(tmp_path: Path, damage: Any, on_disk: bool, caplog: Any):
    where = kept(tmp_path / "memory", disk=tmp_path / "disk")
    save(KvStore(where), LONG)
    copy_to_disk(where, time.monotonic() + 10)
    whole, broken = ("memory", "disk") if on_disk else ("disk", "memory")
    for path in entries(tmp_path / whole):
        path.unlink()
    (entry,) = entries(tmp_path / broken)
    known = KvStore(where)
    assert found(known, LONG) == (LONG, 500)
    entry.write_bytes(damage(entry.read_bytes()))
    assert found(known, LONG) is None, "whoever knew it before"
    assert "is not used and removed" in caplog.text
    assert entries(tmp_path / broken) == []
    save(known, LONG)
    assert found(KvStore(where), LONG) == (LONG, 500)


def test_the_next_best_serves_where_the_best_is_broken(tmp_path: Path):
    store = KvStore(kept(tmp_path))
    save(store, LONG[:300])
    save(store, [*LONG[:250], *range(2000, 2200)])
    save(store, [*LONG, *range(3000, 3500)], 2000)
    best = max(entries(tmp_path), key=lambda path: path.stat().st_size)
    os.truncate(best, 5000)
    assert found(store, LONG) == ([*LONG[:250], *range(2000, 2200)], 250)


def test_the_budget_holds_and_the_least_recently_used_goes(tmp_path: Path):
    store = KvStore(kept(tmp_path, mib=3.5))
    for first in (1, 2, 3):
        save(store, [first] * 300, MIB)
        time.sleep(0.01)
    assert found(store, [1] * 300), "it is used"
    time.sleep(0.01)
    save(store, [4] * 300, MIB)
    assert found(store, [2] * 300) is None
    for first in (1, 3, 4):
        assert found(store, [first] * 300)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 3.5 * MIB
    with pytest.raises(NoRoom):
        save(store, [5] * 300, 4 * MIB)
    assert len(entries(tmp_path)) == 3, "what can never fit drives nothing out"


def test_what_is_saved_already_is_not_written_again_and_what_is_covered_goes(tmp_path: Path):
    store = KvStore(kept(tmp_path))
    save(store, LONG)
    assert save(store, LONG) == 0
    assert save(store, LONG[:300]) == 0
    assert save(store, [*LONG, 1, 2, 3]) == 0, "three tokens are no news"
    longer = [*LONG[:490], *range(2000, 2100)]
    assert save(store, longer) > 0
    assert len(entries(tmp_path)) == 1, "of the old one all but ten tokens are in the new one"
    branch = [*LONG[:300], *range(4000, 4400)]
    assert save(store, branch) > 0
    assert len(entries(tmp_path)) == 2, "two ways to go on from one beginning"


def test_a_state_that_cannot_be_had_leaves_nothing(tmp_path: Path):
    store = KvStore(kept(tmp_path))

    def fill(memory: memoryview) -> None:
        raise ValueError("it is gone")

    with pytest.raises(ValueError, match="gone"):
        store.save(ONE, LONG, 1000, fill, time.monotonic() + 1)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def hang_in_the_middle(where: Places, ready: Any) -> None:
    def fill(memory: memoryview) -> None:
        memory[:500] = b"x" * 500
        ready.send(True)
        time.sleep(100)

    KvStore(where).save(ONE, LONG, 2 * MIB, fill, time.monotonic() + 10)


def test_a_writer_that_is_killed_leaves_no_entry_and_its_room_comes_back(tmp_path: Path):
    where = kept(tmp_path, mib=3.0)
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=hang_in_the_middle, args=(where, theirs))
    process.start()
    assert ours.poll(30)
    store = KvStore(where)
    assert found(store, LONG) is None, "what is not whole is not there"
    with pytest.raises(NoRoom):
        save(store, [9] * 300, 2 * MIB)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert save(store, [9] * 300, 2 * MIB) > 0
    assert found(store, LONG) is None
    assert {path.suffix for path in tmp_path.iterdir()} == {SUFFIX, ""}


def write_many(where: Places, first: int) -> None:
    store = KvStore(where)
    for number in range(30):
        save(store, [first + number] * 300, 100_000)
        store.find(ONE, [first + number // 2] * 300, 0)


def test_several_processes_share_a_store(tmp_path: Path):
    where = kept(tmp_path, mib=2.0)
    spawn = multiprocessing.get_context("spawn")
    writers = [spawn.Process(target=write_many, args=(where, 1000 * number)) for number in range(1, 5)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        held = 0
        for path in tmp_path.iterdir():
            try:
                held += path.stat().st_size
            except FileNotFoundError:
                continue
        # An entry that is being renamed while the folder is read may be seen under both names.
        assert held <= 2.0 * MIB + 4 * 110_000
        time.sleep(0.01)
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 4
    store = KvStore(where)
    for path in entries(tmp_path):
        assert path.stat().st_size > 100_000
    assert len(entries(tmp_path)) > 10
    assert sum(found(store, [1000 * number + 29] * 300) is not None for number in range(1, 5)) >= 1


def hold_the_lock(folder: str, ready: Any) -> None:
    import fcntl

    with open(Path(folder, "lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ready.send(True)
        time.sleep(100)


def test_a_process_that_hangs_with_the_lock_holds_up_nobody(tmp_path: Path):
    store = KvStore(kept(tmp_path))
    save(store, LONG)
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=hold_the_lock, args=(str(tmp_path), theirs))
    process.start()
    try:
        assert ours.poll(30)
        started = time.monotonic()
        with pytest.raises(NoRoom):
            store.save(ONE, [1] * 300, 1000, lambda _: None, time.monotonic() + 0.2)
        assert found(store, LONG) == (LONG, 500), "to find something needs no lock"
        assert time.monotonic() - started < 5
    finally:
        process.kill()
        process.join()


async def test_what_is_in_memory_is_copied_to_the_disk_and_found_there(tmp_path: Path):
    where = kept(tmp_path / "memory", mib=2.2, disk=tmp_path / "disk")
    store = KvStore(where)
    save(store, [1] * 300, MIB)
    save(store, [2] * 300, MIB)
    copying = DiskCopy()
    copying.begin(where)
    await copying.finished()
    save(store, [3] * 300, MIB)
    assert len(entries(tmp_path / "memory")) == 2
    for first in (1, 2, 3):
        assert found(store, [first] * 300) == ([first] * 300, 300), "one of them is on the disk only"
    for path in entries(tmp_path / "memory"):
        path.unlink()
    again = KvStore(where)
    assert found(again, [1] * 300) == ([1] * 300, 300), "after a restart of the pool"
    assert found(again, [3] * 300) is None, "it was not copied"
    await asyncio.sleep(0.01)
    save(again, [4] * 300, MIB)
    copy_to_disk(where, time.monotonic() + 10)
    assert len(entries(tmp_path / "disk")) == 2, "the disk has a budget, too"
    assert found(KvStore(where), [2] * 300) is None


async def test_a_disk_that_fails_is_logged(tmp_path: Path, caplog: Any):
    where = kept(tmp_path / "memory", disk=tmp_path / "disk")
    save(KvStore(where), LONG)
    (tmp_path / "disk").rmdir()
    copying = DiskCopy()
    copying.begin(where)
    await copying.finished()
    assert "was not copied to kv_store_dir" in caplog.text
    assert found(KvStore(where), LONG) == (LONG, 500)


def test_the_memorys_folder_is_this_users_and_ends_with_ray(tmp_path: Path):
    with started_raylet() as raylet:
        where = places(raylet.home, KvStoreConfig(100, str(tmp_path / "made" / "here")))
        assert where is not None
        assert where.memory_bytes == 100 * MIB
        folder = Path(where.memory)
        assert folder == memory_folder(raylet.home.folder)
        assert folder.is_relative_to(MEMORY)
        assert folder.stat().st_mode & 0o777 == folder.parent.stat().st_mode & 0o777 == 0o700
        assert Path(where.disk).stat().st_mode & 0o777 == 0o700
        assert Path(where.disk).is_relative_to(tmp_path / "made" / "here")
        save(KvStore(where), LONG)
        default = places(raylet.home, KvStoreConfig())
        assert default is not None
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        assert 0 < default.memory_bytes < free // 4
        assert (default.disk, default.disk_bytes) == ("", 0)
        assert Places.of(where.as_dict()) == where
    home_of(os.getpid())
    wait_until(lambda: not folder.exists())


def test_without_a_folder_in_memory_nothing_is_saved(tmp_path: Path, monkeypatch: Any, caplog: Any):
    with started_raylet() as raylet:
        monkeypatch.setattr("cluster.home.MEMORY", tmp_path / "not there")
        assert places(raylet.home, KvStoreConfig()) is None
    assert "conversations are not saved" in caplog.text


def test_a_disk_folder_that_cannot_be_made_leaves_the_memory(tmp_path: Path, caplog: Any):
    (tmp_path / "file").write_text("no folder")
    with started_raylet() as raylet:
        where = places(raylet.home, KvStoreConfig(10, str(tmp_path / "file" / "below")))
        assert where is not None
        assert where.disk == ""
    assert "kv_store_dir is not used" in caplog.text


def test_a_copying_goes_on_until_all_is_there(tmp_path: Path, monkeypatch: Any):
    where = kept(tmp_path / "memory", disk=tmp_path / "disk")
    store = KvStore(where)
    save(store, [1] * 300)
    copy_in = Folder.copy_in

    def slow(self: Folder, name: str, source: Path, until: float) -> None:
        copy_in(self, name, source, until)
        save(store, [2] * 300)

    monkeypatch.setattr(placed.Folder, "copy_in", slow)
    asyncio.run(copied(where))
    assert len(entries(tmp_path / "disk")) == 2, "what is saved meanwhile is copied, too"


async def copied(where: Places) -> None:
    copying = DiskCopy()
    copying.begin(where)
    copying.begin(where)
    await copying.finished()
