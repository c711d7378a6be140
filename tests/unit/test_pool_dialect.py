"""The pool dialect of Responses: flat objects and events, decoding, languages, and what a backend cannot use."""

from __future__ import annotations

from typing import Any

import pytest

from cluster import errors
from tests.unit.scripted import QUEUED, Scripted, events, said

PATH = "/llm-pool/v1/responses"
WHOLE = b'{"choices": [{"message": {"content": "Hello"}}]}'


async def post(gateway: Scripted, body: dict[str, Any], path: str = PATH) -> Any:
    async with gateway.http() as http:
        return await http.post(path, json={"model": "m", "input": "x", **body})


def named(text: str) -> list[str]:
    return [line.removeprefix("event: ") for line in text.splitlines() if line.startswith("event: ")]


async def test_a_whole_answer_is_flat():
    answer = (await post(Scripted([WHOLE]), {})).json()
    assert list(answer) == ["id", "object", "model", "output", "output_text", "metrics"]
    assert answer["output"] == [{"type": "output_text", "text": "Hello"}]
    assert (answer["object"], answer["model"], answer["output_text"]) == ("response", "m", "Hello")


async def test_a_stream_has_exactly_its_four_events():
    answer = await post(Scripted(said("Hel", "lo")), {"stream": True})
    assert named(answer.text) == [
        "response.created",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.metrics",
        "response.completed",
    ]
    created, first, second, metrics, completed = events(answer.text)
    response = created["id"]
    assert created == {"id": response, "model": "m", "object": "response"}
    assert (first, second) == ({"id": response, "delta": "Hel"}, {"id": response, "delta": "lo"})
    assert list(metrics) == ["id", "metrics"]
    assert completed == {"id": response, "output_text": "Hello"}
    assert "[DONE]" not in answer.text


async def test_a_stream_that_waits_or_fails_says_so_in_its_own_way():
    answer = await post(Scripted([QUEUED, errors.QueueFull("full")]), {"stream": True})
    assert named(answer.text) == ["response.created", "response.output_text.delta", "error"]
    *_, failed = events(answer.text)
    assert failed["detail"] == {"code": "executor_queue_full", "model": "m", "message": "full"}
    assert failed["error"]["code"] == "GPU_OVERLOADED"


async def test_a_stored_answer_is_flat_or_official_as_it_is_asked_for():
    gateway = Scripted([WHOLE])
    async with gateway.http() as http:
        answer = (await http.post(PATH, json={"model": "m", "input": "x"})).json()
        assert (await http.get(f"{PATH}/{answer['id']}")).json() == answer
        assert (await http.get(f"/v1/responses/{answer['id']}")).json()["output"][0]["type"] == "message"
        missing = await http.get(f"{PATH}/resp_none")
    assert (missing.status_code, missing.json()["detail"]["code"]) == (404, "response_not_found")


@pytest.mark.parametrize("path", [PATH, "/v1/responses"])
async def test_decoding_has_its_defaults_and_wins_over_the_official_fields(path: str, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", logger="slotpool.http")
    gateway = Scripted([WHOLE])
    decoding = {"beam_size": 4, "top_k": 5, "stop": ["END"]}
    answer = await post(gateway, {"decoding": decoding, "top_p": 0.5}, path)
    body = gateway.requests[0][1]
    sampled = {name: body.get(name) for name in ("beam_size", "top_k", "top_p", "temperature", "repetition_penalty")}
    assert sampled == {"beam_size": None, "top_k": 5, "top_p": 0.5, "temperature": 0.1, "repetition_penalty": 1.0}
    assert (body["max_tokens"], body["stop"]) == (256, ["END"])
    assert answer.headers["x-slotpool-ignored"] == "decoding.beam_size"
    assert "decoding.beam_size" in caplog.text


async def test_the_official_route_has_no_defaults_of_the_dialect_and_the_pool_can_have_others():
    gateway = Scripted([WHOLE], [WHOLE], args={"models": {"m": {"backend": "fake"}}, "decoding": {"max_tokens": 9}})
    await post(gateway, {}, "/v1/responses")
    await post(gateway, {})
    assert [body.get("max_tokens") for _, body in gateway.requests] == [None, 9]


async def test_a_server_gets_only_what_it_knows():
    gateway = Scripted([WHOLE], args={"servers": [{"url": "http://127.0.0.1:9"}]})
    answer = await post(gateway, {"decoding": {"top_k": 5, "repetition_penalty": 1.1}})
    assert answer.headers["x-slotpool-ignored"] == "decoding.repetition_penalty, decoding.top_k"
    assert "top_k" not in gateway.requests[0][1]


async def test_a_translation_takes_a_text_and_two_languages():
    args = {"models": {"m": {"backend": "fake", "prompt_format": "translategemma_template"}}}
    gateway = Scripted([WHOLE], args=args)
    body = {"source_lang_code": "de", "target_lang_code": "en-GB", "instructions": "Sing.", "input": "Guten Tag"}
    assert (await post(gateway, body)).status_code == 200
    chat = gateway.requests[0][1]
    assert chat["messages"] == [{"role": "user", "content": "Guten Tag"}]
    assert chat["chat_template_kwargs"] == {"source_lang_code": "de", "target_lang_code": "en-GB"}
    for missing in ("source_lang_code", "target_lang_code"):
        answer = await post(gateway, {**body, missing: None})
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, missing)
    two = [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]
    assert (await post(gateway, {**body, "input": two})).status_code == 422


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"decoding": {"top_p": 0}}, "decoding.top_p"),
        ({"decoding": {"temperature": 2.1}}, "decoding.temperature"),
        ({"decoding": {"repetition_penalty": 4.5}}, "decoding.repetition_penalty"),
        ({"decoding": {"max_tokens": 0}}, "decoding.max_tokens"),
        ({"decoding": {"stop": [1]}}, "decoding.stop.0"),
        ({"input": None}, "input"),
    ],
)
async def test_out_of_bounds_is_422_with_detail(body: dict[str, Any], param: str):
    answer = await post(Scripted(), body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, param)
    detail = answer.json()["detail"]
    assert (detail["code"], detail["model"]) == ("invalid_request", "m")


async def test_an_unknown_model_is_named_in_detail():
    answer = await post(Scripted(), {"model": "none"})
    assert (answer.status_code, answer.json()["detail"]["code"]) == (404, "unknown_model")
    assert answer.json()["detail"]["model"] == "none"
    assert "model" not in (await post(Scripted(), {"model": 7})).json()["detail"]
