"""What the pool did, in sentences."""

from __future__ import annotations

from typing import Any

import pytest

from cluster import sentences
from cluster.ledger.states import Cause


def change(kind: str, **data: Any) -> dict[str, Any]:
    return {"kind": kind, "model": "coder", "data": data}


@pytest.mark.parametrize("cause", [cause.name.lower() for cause in Cause])
def test_every_cause_of_a_transition_has_words(cause: str):
    assert cause in sentences.CAUSES
    told = sentences.of_change(change("replica", cause=cause, devices=[0, 1]))
    assert "coder" in told
    assert told.endswith("on device 0, 1.")


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        (
            change("replica", cause="placed", because={"rule": "demand", "waiter": "9f"}),
            "A process for coder starts, because request 9f waits for it.",
        ),
        (
            change("replica", cause="quiesced", reason="idle_timeout", because={"rule": "idle_timeout"}),
            "coder takes nothing new and ends what runs, because nobody has used it for its idle timeout.",
        ),
        (
            change("swap", victims=["u", "v"], reason="bound", because={"rule": "bound", "bound_in_s": -3.0}),
            "coder gets the room of 2 replicas, because a request must not wait much longer (overdue by 3.0 s).",
        ),
        (
            change("replica", cause="emptied", because={"rule": "idle", "waiter": "9f"}),
            "coder has ended its last request and unloads.",
        ),
        (change("model", state="failed", last_error="no file\nTraceback"), "coder is failed: no file."),
        (change("model", state="unloaded", removed=True), "coder is no longer there."),
        (change("queue", queued=3, by_class=[1, 2, 0]), "3 requests wait for coder (1 high, 2 medium)."),
        (change("queue", queued=0), "Nobody waits for coder."),
        (change("lease", leases=1), "coder runs 1 request."),
        (change("load", progress=0.5), "coder is loaded to 50%."),
        (
            change("server", url="http://x", is_up=False, last_refresh_error="refused"),
            "The server http://x cannot be read: refused.",
        ),
        (
            change(
                "request",
                id="9f",
                trace="mine",
                status=200,
                queue_wait_s=1.25,
                load_wait_s=0.0,
                ttft_s=1.5,
                total_s=2.0,
                output_tokens=9,
            ),
            "Request mine to coder ended with 200: it waited 1.2 s in line, had its first token after 1.50 s, "
            "got 9 tokens in 2.00 s.",
        ),
        (change("request", id="9f", status=429), "Request 9f to coder ended with 429."),
        (change("requests", count=2, output_tokens=1), "2 more requests ended, with 1 token."),
        (change("config"), "The configuration has changed."),
        (change("something new"), "something new."),
    ],
)
def test_an_entry_is_a_sentence(entry: dict[str, Any], sentence: str):
    assert sentences.of_change(entry) == sentence


def test_a_reason_that_is_not_known_is_told_as_it_is():
    assert sentences.why({"rule": "whim"}) == "whim"
    assert sentences.why(None) == ""


def test_a_model_as_it_stands():
    row = {"state": "failed", "last_error": "no file", "backoff_until": 12.0, "queued": 2, "waiting_since": 5.0}
    assert sentences.of_model("coder", row, 10.0) == (
        "coder is failed; 2 requests wait for it, the first for 5.0 s. It failed: no file. It is tried again in 2 s."
    )
    assert sentences.of_model("coder", {"state": "unloaded", "asleep": 1}, 0.0) == "coder is asleep."
