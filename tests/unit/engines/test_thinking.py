"""What a model marks as its thoughts, however its text is cut into pieces."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from deployments.engines.chat.thinking import ThinkingSplitter, is_opened

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


@given(
    st.sampled_from(["[THINK]{}[/THINK]", "<|channel>thought\n{}<channel|>", "\n<think>{}</think>"]),
    st.sets(st.integers(0, 60)),
)
def test_every_familys_mark_counts_and_is_closed_by_its_own(marks: str, places: set[int]):
    thought = "Hm. </thin> [/THIN <channel"
    assert split(cut(marks.format(thought) + "\nYes.", places)) == (thought, "Yes.")
    other = "</think>" if "think>" not in marks else "[/THINK]"
    assert split(cut(marks.format("a" + other) + "b", places)) == ("a" + other, "b")


def test_a_prompt_that_opens_thoughts_is_seen():
    assert is_opened("…<|im_start|>assistant\n<think>\n")
    assert is_opened("<|turn>model\n<|channel>thought\n")
    assert not is_opened("<|turn>model\n<|channel>thought\n<channel|>")
    assert split(["Hm.<channel|>Yes"], "opened") == ("Hm.", "Yes")


@given(
    st.sampled_from(["<b>x</b>", " plain", "", "<thin", "<", "a</think>b", "[TH", "<|channel>th"]),
    st.sets(st.integers(0, 9)),
)
def test_a_text_without_it_is_left_alone(text: str, places: set[int]):
    assert split(cut(text, places)) == ("", text)


@given(st.sets(st.integers(0, 20)))
def test_a_template_may_have_opened_it_and_it_may_never_close(places: set[int]):
    assert split(cut("Hm.</think>Yes", places), "opened") == ("Hm.", "Yes")
    assert split(cut("<think>Hm.</thi", places)) == ("Hm.</thi", "")
