"""What a pool has stored is there when the next one starts on the same file."""

from __future__ import annotations

from pathlib import Path

import openai
import pytest

from tests.pool import fake, running_pool

ANSWER = "words:0 words:1 words:2 "


def test_stored_responses_outlive_their_pool(port: int, tmp_path: Path):
    """Created by one pool; retrieved, continued and deleted by the next, which goes on where the first ended."""
    args = {"models": {"words": fake(tokens=3, tokens_per_s=1000)}, "store": {"folder": str(tmp_path)}}
    with running_pool(port, args) as pool:
        client = pool.openai()
        first = client.responses.create(model="words", input="x", metadata={"a": "b"})
        streamed = list(client.responses.create(model="words", input="y", stream=True))[-1].response
        forgotten = client.responses.create(model="words", input="z", store=False)
    with running_pool(port, args) as pool:
        client = pool.openai()
        assert client.responses.retrieve(first.id).to_dict() == first.to_dict()
        assert client.responses.retrieve(streamed.id).output_text == ANSWER
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(forgotten.id)
        second = client.responses.create(model="words", input="y", previous_response_id=first.id)
        assert (second.previous_response_id, second.output_text) == (first.id, ANSWER)
        assert [item.content[0].text for item in client.responses.input_items.list(first.id)] == ["x"]
        client.responses.delete(first.id)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(first.id)
        pool.check()
