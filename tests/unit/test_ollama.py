"""Ollama's API as an adapter: its bodies as a chat, its lines of JSON, and requests that are not sent away."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ollama
import pytest

from app import model_files
from app.model_files import UNKNOWN, ModelFile, model_file
from app.routes import ollama_rows
from app.routes.ollama import known_name
from app.wire.ollama.adapter import OllamaAdapter
from app.wire.ollama.chat import seconds
from cluster import errors
from cluster.config import load_config
from cluster.errors import PoolError
from cluster.ledger.snapshot import ModelRow, Snapshot
from deployments.schemas import CHAT, COMPLETIONS, EMBEDDINGS
from tests.pool import SMOLLM2
from tests.unit.scripted import QUEUED, Scripted, chunk, said

ASKED = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def chat(**fields: Any) -> dict[str, Any]:
    return OllamaAdapter({**ASKED, **fields}).chat


def generate(**fields: Any) -> OllamaAdapter:
    return OllamaAdapter({"model": "m", "prompt": "Hi", **fields}, generates=True)


async def ask(gateway: Scripted, path: str = "/api/chat", **fields: Any) -> Any:
    asked = ASKED if path == "/api/chat" else {"model": "m", "prompt": "Hi"}
    async with gateway.http() as http:
        return await http.post(path, json={**asked, **fields})


async def lines(*script: bytes | PoolError, path: str = "/api/chat", **fields: Any) -> list[dict[str, Any]]:
    answer = await ask(Scripted(list(script)), path, **fields)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert answer.text.endswith("\n")
    assert "" not in answer.text[:-1].split("\n")
    return [json.loads(line) for line in answer.text.splitlines()]


async def test_a_chat_is_streamed_unless_told_otherwise():
    seen = [ollama.ChatResponse(**line) for line in await lines(*said("Hel", "lo"))]
    assert [(line.message.content, line.done) for line in seen] == [("Hel", False), ("lo", False), ("", True)]
    last = seen[-1]
    assert (last.model, last.done_reason, last.prompt_eval_count, last.eval_count) == ("m", "stop", 3, 2)
    assert (last.prompt_eval_duration, last.eval_duration) == (5_000_000, 4_000_000)
    assert last.total_duration
    assert last.created_at
    assert last.created_at.endswith("Z")


async def test_thinking_and_calls_in_a_stream():
    call = {"index": 0, "id": "c", "function": {"name": "add", "arguments": ""}}
    more = {"index": 0, "function": {"arguments": '{"x": 1}'}}
    script = [chunk({"reasoning_content": "hm"}), *(chunk({"tool_calls": [each]}) for each in (call, more))]
    thought, called, last = await lines(*script, *said(finish="tool_calls"), tools=[TOOL])
    assert thought["message"] == {"role": "assistant", "content": "", "thinking": "hm"}
    assert called["message"]["tool_calls"] == [
        {"id": "c", "function": {"index": 0, "name": "add", "arguments": {"x": 1}}}
    ]
    assert (last["done"], last["done_reason"]) == (True, "stop")
    assert ollama.ChatResponse(**called).message.tool_calls


async def test_whole_answers():
    message = {"content": "x", "tool_calls": [{"id": "c", "function": {"name": "add", "arguments": "{}"}}]}
    usage = {"prompt_tokens": 9, "completion_tokens": 4}
    body = {"choices": [{"message": message, "finish_reason": "length"}], "usage": usage}
    whole = ollama.ChatResponse(**(await ask(Scripted([json.dumps(body).encode()]), stream=False)).json())
    assert (whole.message.content, whole.done_reason, whole.eval_count) == ("x", "length", 4)
    assert whole.message.tool_calls[0].function.arguments == {}
    text = {"choices": [{"text": "y", "finish_reason": "stop"}], "usage": usage}
    answer = await ask(Scripted([json.dumps(text).encode()]), "/api/generate", stream=False, raw=True)
    assert ollama.GenerateResponse(**answer.json()).response == "y"


async def test_generate_is_a_chat_or_a_raw_completion():
    gateway = Scripted(said("a"))
    answer = await ask(gateway, "/api/generate", system="S")
    assert json.loads(answer.text.splitlines()[0])["response"] == "a"
    assert [message["content"] for message in gateway.requests[0][1]["messages"]] == ["S", "Hi"]
    text = b'data: {"choices":[{"index":0,"text":"b","finish_reason":null}]}\n\n'
    first, last = await lines(text, *said()[-1:], path="/api/generate", raw=True)
    assert (first["response"], last["response"], last["done"]) == ("b", "", True)
    raw = generate(raw=True)
    assert (raw.path, raw.chat["prompt"]) == (COMPLETIONS, "Hi")
    assert generate(suffix="end").chat["suffix"] == "end"
    assert generate().path == CHAT
    for fields in ({"template": "t"}, {"context": [1]}, {"raw": True, "images": ["AA=="]}):
        with pytest.raises(errors.UnsupportedParameter):
            generate(**fields)


@pytest.mark.parametrize(("model", "path"), [("base", COMPLETIONS), ("formatted", CHAT), ("fake", CHAT)])
async def test_a_model_without_a_template_continues_the_prompt(
    model: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "base.gguf"
    file.write_bytes(b"x")
    metadata = {"general.architecture": "gemma3"}
    monkeypatch.setattr(model_files, "read_header", lambda _: SimpleNamespace(metadata=metadata))
    models = {
        "base": {"model_path": str(file)},
        "formatted": {"model_path": str(file), "prompt_format": "chatml"},
        "fake": {"backend": "fake"},
    }
    gateway = Scripted([b'{"choices": [{"text": "x", "message": {"content": "x"}}]}'], args={"models": models})
    assert (await ask(gateway, "/api/generate", model=model, stream=False)).json()["response"] == "x"
    assert gateway.requests[0][0].path == path


async def test_a_waiting_stream_has_empty_messages():
    waiting, *_ = await lines(QUEUED, *said("a"))
    assert waiting["message"] == {"role": "assistant", "content": ""}
    assert waiting["done"] is False


@pytest.mark.parametrize(("path", "fields"), [("/api/chat", {}), ("/api/generate", {}), ("/api/embed", {"input": "x"})])
async def test_a_request_waits_for_as_long_as_its_client_unless_it_says_for_how_long(path: str, fields: dict[str, Any]):
    for said_s, is_patient in ((None, True), (5, False)):
        gateway = Scripted([b'{"data": [{"embedding": [1.0]}]}'] if "input" in fields else said("a"))
        answer = await ask(gateway, path, **fields, **({} if said_s is None else {"timeout_s": said_s}))
        assert answer.status_code == 200
        assert gateway.requests[0][0].is_patient is is_patient


async def test_other_errors_are_told_at_once():
    refused = await ask(Scripted([errors.ModelUnavailable("broken")]))
    assert (refused.status_code, refused.json()["error"]) == (503, "broken")
    assert (await lines(QUEUED, errors.ModelUnavailable("broken")))[-1]["error"] == "broken"
    running = errors.BackendTimeout("slow", phase="running")
    assert (await lines(chunk({"content": "a"}), running))[-1]["error"] == "slow"
    unknown = await ask(Scripted(), model="nope")
    assert (unknown.status_code, type(unknown.json()["error"])) == (404, str)
    bad = await ask(Scripted(), options={"temperature": 9})
    assert (bad.status_code, bad.json()["error"].startswith("options.temperature")) == (400, True)
    pulled = await ask(Scripted(), "/api/pull")
    assert (pulled.status_code, "configuration" in pulled.json()["error"]) == (501, True)


async def test_embeddings():
    found = {"data": [{"embedding": [1.0, 2.0]}], "usage": {"prompt_tokens": 4}}
    gateway = Scripted([json.dumps(found).encode()], [json.dumps(found).encode()])
    answer = ollama.EmbedResponse(**(await ask(gateway, "/api/embed", input=["x"], keep_alive="1m")).json())
    assert (list(answer.embeddings), answer.prompt_eval_count) == ([[1.0, 2.0]], 4)
    assert (await ask(gateway, "/api/embeddings")).json() == {"embedding": [1.0, 2.0]}
    for odd in (b"{}", b'{"data": 7}', b'{"data": []}'):
        assert (await ask(Scripted([odd]), "/api/embed", input="x")).status_code == 502
    (request, body), (_, older) = gateway.requests
    assert (request.path, request.keep_alive_s, body["input"], older["input"]) == (EMBEDDINGS, 60.0, ["x"], "Hi")


# --- from a body to a chat


def test_options_have_ollamas_defaults_and_names():
    assert chat(stream=False) == {
        **ASKED,
        "clamp_max_tokens": True,
        "temperature": 0.8,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.0,
        "repeat_penalty": 1.1,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }
    options = {"num_predict": 7, "seed": 3, "stop": ["END"], "temperature": 0, "top_k": 2.0, "num_ctx": 4096}
    adapter = OllamaAdapter({**ASKED, "options": options, "keep_alive": "5m", "priority": "high"})
    wanted = {"max_tokens": 7, "seed": 3, "stop": ["END"], "temperature": 0, "top_k": 2, "keep_alive": 300.0}
    assert {name: adapter.chat[name] for name in wanted} == wanted
    assert adapter.chat["priority"] == "high"
    assert adapter.ignored == ["options.num_ctx"]


def test_formats_and_thinking():
    assert chat(format="json")["response_format"] == {"type": "json_object"}
    schema = {"type": "object"}
    assert chat(format=schema)["response_format"]["json_schema"]["schema"] == schema
    assert "response_format" not in chat(format="")
    assert chat(think=False)["chat_template_kwargs"] == {"enable_thinking": False}
    assert chat(think="high")["chat_template_kwargs"] == {"enable_thinking": True, "reasoning_effort": "high"}
    assert chat(logprobs=True, top_logprobs=2)["top_logprobs"] == 2


def test_results_of_tools_belong_to_calls_in_their_order():
    def call(name: str) -> dict[str, Any]:
        return {"function": {"name": name, "arguments": {"x": 1}}}

    turns = [
        {"role": "assistant", "content": "", "tool_calls": [call("add"), call("sub")]},
        {"role": "tool", "content": "2", "tool_name": "sub"},
        {"role": "tool", "content": "3"},
        {"role": "user", "content": "see", "images": ["iVBORw0KGgo="]},
    ]
    calling, second, first, user = chat(messages=turns)["messages"]
    ids = [each["id"] for each in calling["tool_calls"]]
    assert ids == ["call00000", "call00001"]
    assert json.loads(calling["tool_calls"][0]["function"]["arguments"]) == {"x": 1}
    assert [second["tool_call_id"], first["tool_call_id"]] == [ids[1], ids[0]]
    assert user["content"][1]["image_url"]["url"] == "data:image/png;base64,iVBORw0KGgo="


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, None),
        (0, 0.0),
        ("0", 0.0),
        (90, 90.0),
        ("5m", 300.0),
        ("1h30m", 5400.0),
        ("1.5s", 1.5),
        ("300ms", 0.3),
        (-1, -1.0),
        ("-1m", -1.0),
    ],
)
def test_keep_alive(given: float | str | None, expected: float | None):
    assert seconds(given) == expected


@pytest.mark.parametrize("given", ["soon", "5 m", "", "nan", "inf", "5x"])
def test_a_keep_alive_that_is_none_is_refused(given: str):
    with pytest.raises(errors.InvalidRequest) as refused:
        seconds(given)
    assert refused.value.param == "keep_alive"


def test_names_with_and_without_their_tag():
    config = load_config({"models": {"a": {"backend": "fake"}, "b:latest": {"backend": "fake"}}}, environ={})
    assert [known_name(config, name) for name in ("a", "a:latest", "b", "b:latest", "c:latest")] == [
        "a",
        "a",
        "b:latest",
        "b:latest",
        "c:latest",
    ]


# --- what there is


def test_rows_tell_what_the_file_says():
    models = {"s": {"model_path": SMOLLM2, "gguf_n_ctx": 1024, "num_gpus": 1}, "f": {"backend": "fake"}}
    config = load_config({"models": models}, environ={})
    file = model_file(config.models["s"].model_path)
    tags = [ollama_rows.tag("s", config.models["s"], file), ollama_rows.tag("f", config.models["f"], UNKNOWN)]
    listed = ollama.ListResponse(models=tags).models
    assert listed[0].size == file.size > 90_000_000
    assert (listed[0].details.family, listed[0].details.quantization_level) == ("llama", "Q4_1")
    shown = ollama_rows.shown("s", config.models["s"], file)
    assert ollama.ShowResponse(**shown).modelinfo["llama.context_length"] == 8192
    assert shown["capabilities"] == ["completion", "tools"]
    assert "1024" in shown["parameters"]
    assert json.dumps(shown)


def test_running_models_expire():
    config = load_config({"models": {"f": {"backend": "fake", "idle_timeout": 60}}}, environ={})
    rows = {"f": ModelRow(state="loaded", last_arrival=90.0)}
    ledger = Snapshot(epoch="e", models=rows, now=100.0, time=1000.0)
    running = ollama_rows.running("f", config, ledger, ModelFile(size=5))
    assert running["expires_at"] == ollama_rows.stamp(1050.0)
    assert (running["size"], running["size_vram"]) == (5, 0)
    assert ollama.ProcessResponse(models=[running]).models[0].expires_at
    rows["f"] = ModelRow(state="loaded", pinned=True)
    assert ollama_rows.running("f", config, ledger, UNKNOWN)["expires_at"] == ollama_rows.NEVER
