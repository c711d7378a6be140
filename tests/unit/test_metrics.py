"""What is counted of a request."""

from __future__ import annotations

import pytest

from cluster.metrics import Outcome, family


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/v1/chat/completions", "chat"),
        ("/v1/completions", "completions"),
        ("/llm-pool/v1/responses", "responses"),
        ("/v1/secret/../x", "other"),
    ],
)
def test_the_family_of_a_route(path: str, name: str):
    assert family(path) == name


def test_time_per_output_token_needs_a_second_token():
    outcome = Outcome("m", "chat", "anonymous", 2, 200, ttft_s=1.0, total_s=3.0, output_tokens=5)
    assert outcome.tpot_s == 0.5
    assert outcome._replace(output_tokens=1).tpot_s is None
    assert outcome._replace(ttft_s=None).tpot_s is None
