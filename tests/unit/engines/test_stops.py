"""Stop strings and UTF-8: for any text, split in any way."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.engines.chat.stops import StopScanner
from deployments.engines.chat.utf8 import TextAssembler

texts = st.text(alphabet="ab<c\n", max_size=40)
stops = st.lists(st.text(alphabet="ab<c\n", min_size=1, max_size=4), max_size=4)


def expected(text: str, stops: list[str]) -> tuple[str, bool]:
    """The text before the stop string that is complete first, found the slow way."""
    for end in range(1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            return text[: end - max(map(len, hits))], True
    return text, False


def split(text: str | bytes, cuts: list[int]) -> list[str | bytes]:
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


@settings(deadline=None)
@given(texts, stops, st.lists(st.integers(0, 1000), max_size=12))
def test_any_split_gives_the_text_before_the_first_stop(text: str, stops: list[str], cuts: list[int]) -> None:
    scanner = StopScanner(stops)
    whole, stopped = expected(text, stops)
    shown = ""
    for piece in split(text, cuts):
        shown += scanner.push(str(piece))
        assert whole.startswith(shown), "a part of a stop string leaked"
    assert (scanner.stopped_by is not None) == stopped
    assert shown + scanner.flush() == whole


@settings(deadline=None)
@given(texts, stops)
def test_nothing_is_held_that_cannot_become_a_stop(text: str, stops: list[str]) -> None:
    scanner = StopScanner(stops)
    shown = scanner.push(text)
    held = "" if scanner.stopped_by else text[len(shown) :]
    assert held == "" or any(stop.startswith(held) for stop in stops)


def test_without_stops_nothing_is_held() -> None:
    assert StopScanner(()).push("<") == "<"


@settings(deadline=None)
@given(st.text(max_size=20), st.lists(st.integers(0, 1000), max_size=12))
def test_characters_survive_any_split_of_their_bytes(text: str, cuts: list[int]) -> None:
    raw = text.encode("utf-8", "surrogatepass") if text.isascii() else text.encode("utf-8", "replace")
    assembler = TextAssembler()
    shown = "".join(assembler.push(bytes(piece)) for piece in split(raw, cuts))  # type: ignore[arg-type]
    assert shown + assembler.finish() == raw.decode()


def test_half_a_character_is_never_shown() -> None:
    assembler = TextAssembler()
    wave = "👋".encode()
    assert [assembler.push(wave[i : i + 1]) for i in range(4)] == ["", "", "", "👋"]


def test_a_character_cut_off_by_the_end_is_marked() -> None:
    assembler = TextAssembler()
    assert assembler.push("é".encode()[:1]) == ""
    assert assembler.finish() == "\ufffd"


def test_a_stop_string_of_wide_characters() -> None:
    assembler = TextAssembler(("世界",))
    raw = "你好世界!".encode()
    assert "".join(assembler.push(raw[i : i + 1]) for i in range(len(raw))) == "你好"
    assert assembler.stopped
    assert assembler.finish() == ""
