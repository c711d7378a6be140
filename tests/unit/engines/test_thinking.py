"""What a model marks as its thoughts, however its text is cut into pieces."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from deployments.engines.chat.thinking import ThinkingSplitter

MARKED = "\n<think>\nOne <b> two </thin no\n</think>\n\nAnswer <think> 3 </think>."


def split(pieces: list[str], start: str = "start") -> tuple[str, str]:
    splitter = ThinkingSplitter(start)  # type: ignore[arg-type]
    said = [each for piece in pieces for each in splitter.push(piece)] + splitter.finish()
    thoughts, text = ("".join(text for kind, text in said if kind == wanted) for wanted in ("reasoning", "text"))
    return thoughts, text


def cut(text: str, places: set[int]) -> list[str]:
    edges = [0, *sorted(place for place in places if place < len(text)), len(text)]
    return [text[first:last] for first, last in pairwise(edges)]


@given(st.sets(st.integers(0, len(MARKED))))
def test_only_the_mark_at_the_beginning_counts(places: set[int]):
    assert split(cut(MARKED, places)) == ("One <b> two </thin no\n", "Answer <think> 3 </think>.")


@given(st.sampled_from(["<b>x</b>", " plain", "", "<thin", "<", "a</think>b"]), st.sets(st.integers(0, 9)))
def test_a_text_without_it_is_left_alone(text: str, places: set[int]):
    assert split(cut(text, places)) == ("", text)


@given(st.sets(st.integers(0, 20)))
def test_a_template_may_have_opened_it_and_it_may_never_close(places: set[int]):
    assert split(cut("Hm.</think>Yes", places), "opened") == ("Hm.", "Yes")
    assert split(cut("<think>Hm.</thi", places)) == ("Hm.</thi", "")
