"""Embeddings and tokens with real weights."""

from __future__ import annotations

import asyncio
import base64
import struct

import numpy as np
import pytest

from cluster.errors import ContextLengthExceeded, InvalidRequest, UnsupportedParameter
from deployments.engines.llama_cpp.engine import LlamaCppEngine
from tests.unit.engines.drive import ask, body, text

EMBEDDINGS, TOKENIZE, DETOKENIZE = "/v1/embeddings", "/tokenize", "/detokenize"
CATS, DOGS, SHIPS = "My cat sleeps on the sofa.", "My dog sleeps on the carpet.", "int main(void) { return 0; }"


async def vectors(engine: LlamaCppEngine, *inputs: object, **fields: object) -> list[np.ndarray]:
    answer = await body(engine, {"input": list(inputs), **fields}, EMBEDDINGS)
    assert [row["index"] for row in answer["data"]] == list(range(len(inputs)))
    return [np.array(row["embedding"]) for row in answer["data"]]


async def test_what_is_alike_lies_close_together(engine: LlamaCppEngine):
    cats, dogs, ships = await vectors(engine, CATS, DOGS, SHIPS)
    assert cats.shape == (576,)
    assert np.linalg.norm(cats) == pytest.approx(1.0, abs=1e-5)
    assert cats @ dogs > cats @ ships + 0.1


async def test_an_embedding_does_not_depend_on_what_else_runs(engine: LlamaCppEngine):
    """Also over several batches, since an input may be longer than one batch has outputs; and no stream hears of it."""
    long = "The sea is wide and blue. " * 60
    alone = (await vectors(engine, long))[0]
    expected = await text(engine, ask("Write one sentence about the sea."))
    several, said = await asyncio.gather(
        vectors(engine, CATS, long, DOGS), text(engine, ask("Write one sentence about the sea."))
    )
    assert alone @ several[1] == pytest.approx(1.0, abs=1e-3)
    assert said == expected


async def test_tokens_and_base64_are_the_same_embedding(engine: LlamaCppEngine):
    answer = await body(engine, {"content": CATS, "add_special": True}, TOKENIZE)
    (plain,) = await vectors(engine, CATS)
    (by_tokens,) = await vectors(engine, answer["tokens"])
    assert plain @ by_tokens == pytest.approx(1.0, abs=1e-3)
    packed = await body(engine, {"input": CATS, "encoding_format": "base64"}, EMBEDDINGS)
    raw = base64.b64decode(packed["data"][0]["embedding"])
    assert plain @ np.array(struct.unpack("<576f", raw)) == pytest.approx(1.0, abs=1e-3)
    assert packed["usage"] == {"prompt_tokens": answer["count"], "total_tokens": answer["count"]}


async def test_more_inputs_than_slots_run_in_turns(engine: LlamaCppEngine):
    inputs = [f"The number is {index}." for index in range(20)]
    rows = await vectors(engine, *inputs)
    (first,) = await vectors(engine, inputs[-1])
    assert rows[-1] @ first == pytest.approx(1.0, abs=1e-3)


async def test_what_cannot_be_embedded_is_refused(engine: LlamaCppEngine):
    with pytest.raises(ContextLengthExceeded):
        await vectors(engine, "sea " * 2000)
    with pytest.raises(UnsupportedParameter):
        await vectors(engine, CATS, dimensions=8)
    with pytest.raises(InvalidRequest, match="below 49152"):
        await vectors(engine, [49152])


async def test_tokens_there_and_back(engine: LlamaCppEngine):
    answer = await body(engine, {"content": CATS, "with_pieces": True}, TOKENIZE)
    assert "".join(token["piece"] for token in answer["tokens"]) == CATS
    back = await body(engine, {"tokens": [token["id"] for token in answer["tokens"]]}, DETOKENIZE)
    assert back["content"] == back["prompt"] == CATS
    with pytest.raises(InvalidRequest, match="below 49152"):
        await body(engine, {"tokens": [49152]}, DETOKENIZE)


async def test_a_chat_is_counted_as_the_model_sees_it(engine: LlamaCppEngine):
    question = ask("Hello!")
    counted = await body(engine, question, TOKENIZE)
    answer = await body(engine, question)
    assert counted["count"] == answer["usage"]["prompt_tokens"]
    assert counted["max_model_len"] == 1024
