"""ExLlamaV3 against its documented interface: what it is asked for, and what becomes of what it says. No GPU is needed;
`tests/contract` has the library itself, where it is installed."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from cluster.config import ModelConfig
from cluster.errors import BackendUnavailable, InvalidRequest, ModelUnavailable, PoolError
from deployments.engines.exllamav3.engine import ExllamaEngine
from deployments.engines.protocol import Call
from deployments.engines.registry import build_engine, capabilities, estimate_mib
from tests.unit.engines.drive import COMPLETIONS, WEATHER, body, events, stream_of
from tests.unit.engines.scripted_exllama import WORDS, Library

pytest.importorskip("tokenizers")


def configured(**keys: Any) -> ModelConfig:
    return ModelConfig.model_validate({"backend": "exllamav3", "model_path": "/m", "num_gpus": 1, **keys})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the words `w0 `, `w1 `, …"""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    path = tmp_path_factory.mktemp("exl3")
    tokenizer = Tokenizer(models.WordLevel({f"w{index}": index for index in range(WORDS)}, unk_token="w99"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.save(str(path / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, "eos_token": "w60"}))
    shape = {"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 512}
    (path / "config.json").write_text(json.dumps({**shape, "max_position_embeddings": 4096}))
    (path / "model.safetensors").write_bytes(bytes(5 << 20))
    return path


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    scripted = Library()
    monkeypatch.setitem(sys.modules, "exllamav3", scripted)
    torch = SimpleNamespace(tensor=np.array, cuda=SimpleNamespace(is_available=lambda: True))
    monkeypatch.setitem(sys.modules, "torch", torch)
    return scripted


async def loaded(folder: Path, **keys: Any) -> ExllamaEngine:
    engine = build_engine("m", configured(**keys), str(folder))
    assert isinstance(engine, ExllamaEngine)
    await engine.load(lambda _: None)
    return engine


@pytest.fixture
async def engine(library: Library, folder: Path) -> AsyncIterator[ExllamaEngine]:
    engine = await loaded(folder, target_inflight=4)
    yield engine
    library.go_on.set()
    await engine.unload()


def asks(word: int, **fields: Any) -> dict[str, Any]:
    """A completion that begins with the next word."""
    return {"prompt": f"w1 w2 w{word}", "max_tokens": 3, **fields}


# --- the configuration ------------------------------------------------------------------------------------------------


def test_its_keys_say_how_the_cache_is_kept():
    assert configured().cache_bits is None
    assert configured(exllama_cache_quant=8).cache_bits == (8, 8)
    assert configured(exllama_cache_quant="8,4").cache_bits == (8, 4)
    assert configured(exllama_cache_k_bits=6, exllama_cache_v_bits=3).cache_bits == (6, 3)
    assert configured().format == "exl3"
    assert capabilities(configured()) == ["chat", "completions", "detokenize", "tokenize"]


@pytest.mark.parametrize(
    ("keys", "mistake"),
    [
        ({"exllama_cache_size": 300}, "exllama_cache_size"),
        ({"exllama_cache_quant": "4"}, "exllama_cache_quant"),
        ({"exllama_cache_k_bits": 4}, "needed together"),
        ({"exllama_cache_k_bits": 9, "exllama_cache_v_bits": 4}, "exllama_cache_k_bits"),
        ({"exllama_cache_quant": "8", "exllama_cache_k_bits": 4, "exllama_cache_v_bits": 4}, "exclude each other"),
        ({"exllama_max_rq_tokens": 0}, "exllama_max_rq_tokens"),
        ({"engine_kwargs": {"max_chunk_size": 100}}, "max_chunk_size"),
        ({"model_path": None}, "model_path"),
    ],
)
def test_a_mistake_is_named(keys: dict[str, Any], mistake: str):
    with pytest.raises(ValidationError, match=mistake):
        configured(**keys)


def test_its_memory_is_its_weights_and_its_cache(folder: Path):
    def estimate(**keys: Any) -> int:
        found = estimate_mib(configured(**keys), folder)
        assert found is not None
        return found

    # 2 layers of 4 heads of 64 numbers, twice: 2 KiB of 16 bits for a token.
    assert estimate(exllama_cache_size=8192) - estimate(exllama_cache_size=4096) == 8
    assert estimate() == estimate(exllama_cache_size=4096), "the model's own context"
    # 8 bits and a scale of 16 bits for 32 numbers.
    assert estimate(exllama_cache_size=1 << 20) - estimate(exllama_cache_size=1 << 20, exllama_cache_quant="8") == 960
    assert estimate_mib(configured(), folder / "nowhere") is None


# --- loading ----------------------------------------------------------------------------------------------------------


async def test_where_it_is_not_installed_one_line_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "exllamav3", None)
    with pytest.raises(ModelUnavailable, match="not installed") as refused:
        await loaded(folder)
    assert "pip install 'slotpool[exllamav3]'" in str(refused.value)
    assert "\n" not in str(refused.value)


async def test_without_a_gpu_one_line_says_so(folder: Path, library: Library):
    with pytest.raises(ModelUnavailable, match="needs num_gpus"):
        await loaded(folder, num_gpus=0)
    sys.modules["torch"].cuda.is_available = lambda: False  # type: ignore[attr-defined]
    with pytest.raises(ModelUnavailable, match="PyTorch finds none"):
        await loaded(folder)


async def test_a_load_that_fails_tells_no_path(folder: Path, library: Library):
    library.load_error = AssertionError(f"No architecture defined in {folder}/config.json\nand more")
    with pytest.raises(ModelUnavailable) as refused:
        await loaded(folder)
    assert str(refused.value) == f"ExLlamaV3 cannot load {folder.name}: No architecture defined in " + (
        f"{folder.name}/config.json"
    )


async def test_the_options_reach_the_library(folder: Path, library: Library):
    seen: list[float] = []
    keys = {"exllama_cache_size": 512, "exllama_cache_quant": "8,4", "exllama_max_rq_tokens": 100, "num_gpus": 2}
    kwargs = {"max_chunk_size": 512, "tensor_parallel": True}
    engine = build_engine("m", configured(**keys, target_inflight=3, engine_kwargs=kwargs), str(folder))
    await engine.load(seen.append)
    assert seen == [0.0, 0.5, 1.0, 1.0]
    assert library.caches == [{"size": 512, "layer": "quantised", "bits": (8, 4)}]
    assert library.model.loaded_with == {"max_chunk_size": 512, "tensor_p": True}
    (generator,) = library.generators
    assert (generator.max_batch_size, generator.max_chunk_size) == (3, 512)
    assert engine.info().context_length == 511
    await body(engine, asks(7), COMPLETIONS)
    assert library.jobs[0].options.max_rq_tokens == 100
    await engine.unload()
    assert generator.is_closed
    assert library.model.loaded_with is None


# --- answering --------------------------------------------------------------------------------------------------------


async def test_an_answer_whole_and_streamed(engine: ExllamaEngine, library: Library):
    whole = await body(engine, asks(7), COMPLETIONS)
    assert whole["choices"][0]["text"] == "w8 w9 w10 "
    assert whole["choices"][0]["finish_reason"] == "length"
    counted = whole["usage"]
    assert (counted["prompt_tokens"], counted["completion_tokens"]) == (3, 3)
    assert counted["prompt_tokens_details"]["cached_tokens"] == 3
    chunks = await events(engine, {"messages": [{"role": "user", "content": "w1 w47"}]})
    said = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks]
    assert "".join(said) == "w48 w49 ", "the token that ends an answer is no text"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["metrics"]["engine_output_tokens"] == 3, "but it is counted"
    going_on = await body(engine, asks(48, ignore_eos=True), COMPLETIONS)
    assert going_on["choices"][0]["text"] == "w49 w50 w51 "


async def test_how_it_samples_is_what_the_request_says(engine: ExllamaEngine, library: Library):
    fields = {"temperature": 0.5, "top_k": 9, "top_p": 0.8, "min_p": 0.1, "seed": 7, "repetition_penalty": 1.2}
    more = {"frequency_penalty": 0.3, "presence_penalty": 0.4, "logit_bias": {"5": 2.0}, "n": 2}
    answer = await body(engine, asks(7, **fields, **more), COMPLETIONS)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    first, second = (job.options for job in library.jobs)
    assert first.sampler == {
        "rep_p": 1.2,
        "freq_p": 0.3,
        "pres_p": 0.4,
        "temperature": 0.5,
        "min_p": 0.1,
        "top_k": 9,
        "top_p": 0.8,
        "logit_bias": {5: 2.0},
    }
    assert (first.seed, second.seed) == (7, 8), "each choice has its own numbers"
    await body(engine, asks(7, temperature=0), COMPLETIONS)
    assert library.jobs[-1].options.sampler["temperature"] == 0.0


async def test_what_comes_together_is_one_batch(engine: ExllamaEngine, library: Library):
    library.go_on.clear()
    asked = [asyncio.create_task(body(engine, asks(word), COMPLETIONS)) for word in (7, 17, 27)]
    async with asyncio.timeout(10):
        while len(library.jobs) < 3:
            await asyncio.sleep(0.002)
            library.go_on.set()
    answers = [(await each)["choices"][0]["text"] for each in asked]
    assert answers == ["w8 w9 w10 ", "w18 w19 w20 ", "w28 w29 w30 "]
    assert max(library.generators[0].batches) > 1


async def test_a_stop_string_ends_the_librarys_job(engine: ExllamaEngine, library: Library):
    answer = await body(engine, asks(7, max_tokens=40, stop=["9 w1"]), COMPLETIONS)
    assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == ("w8 w", "stop")
    assert library.cancelled == library.jobs


async def test_a_client_that_leaves_frees_its_place(engine: ExllamaEngine, library: Library):
    chunks = stream_of(engine, Call(COMPLETIONS, asks(1, max_tokens=40, stream=True), "r"))
    await anext(chunks)
    library.go_on.clear()
    await chunks.aclose()
    library.go_on.set()
    assert (await body(engine, asks(60), COMPLETIONS))["choices"][0]["text"] == "w61 w62 w63 "
    assert library.generators[0].jobs == []


async def test_log_probabilities_are_the_models_own(engine: ExllamaEngine):
    answer = await body(engine, asks(7, logprobs=2), COMPLETIONS)
    scores = answer["choices"][0]["logprobs"]
    assert scores["tokens"] == ["w8", "w9", "w10"]
    assert list(scores["top_logprobs"][0]) == ["w8", "w9"], "what pads the vocabulary is no token"
    assert scores["token_logprobs"][0] == pytest.approx(-0.127, abs=0.001)
    with pytest.raises(InvalidRequest) as refused:
        await body(engine, asks(7, logprobs=2, echo=True), COMPLETIONS)
    assert refused.value.param == "logprobs"


async def test_formats_are_grammars_of_the_librarys_own(engine: ExllamaEngine, library: Library):
    async def given(**fields: Any) -> dict[str, Any]:
        await body(engine, {"messages": [{"role": "user", "content": "w1"}], "max_tokens": 2, **fields})
        (made,) = library.jobs[-1].options.filters
        return {name: value for name, value in made.given.items() if value is not None}

    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert await given(response_format=form) == {"json_schema": schema}
    assert await given(response_format={"type": "json_object"}) == {"json_schema": {"type": "object"}}
    assert await given(grammar='root ::= "a"') == {"gbnf_grammar": 'root ::= "a"'}
    forced = (await given(tools=[WEATHER], tool_choice="required"))["lark_grammar"]
    assert forced.startswith('start: "<tool_call>\\n" call "\\n</tool_call>"\ncall: %json {')
    form["json_schema"] = {"name": "x", "schema": {"type": "nonsense"}}
    with pytest.raises(InvalidRequest, match="nonsense") as refused:
        await given(response_format=form)
    assert refused.value.param == "response_format"


# --- failures ---------------------------------------------------------------------------------------------------------


async def test_a_sequence_that_fails_fails_alone(engine: ExllamaEngine, library: Library):
    library.fails_at = 17
    good, bad = await asyncio.gather(
        body(engine, asks(7), COMPLETIONS), body(engine, asks(17), COMPLETIONS), return_exceptions=True
    )
    assert isinstance(bad, BackendUnavailable)
    assert isinstance(good, dict)


async def test_a_step_that_fails_costs_what_runs_and_no_more(engine: ExllamaEngine, library: Library):
    library.error = RuntimeError("CUDA error")
    with pytest.raises(BackendUnavailable):
        await body(engine, asks(7), COMPLETIONS)
    assert (await body(engine, asks(7), COMPLETIONS))["choices"][0]["text"] == "w8 w9 w10 "
    first, second = library.generators
    assert first.is_closed
    assert not second.is_closed
    assert await engine.answers()


async def test_without_a_generator_the_engine_is_dead(engine: ExllamaEngine, library: Library):
    library.error, library.no_generator = RuntimeError("CUDA error"), True
    with pytest.raises(PoolError):
        await body(engine, asks(7), COMPLETIONS)
    async with asyncio.timeout(10):
        assert await engine.died() == "ExLlamaV3's generator has failed"
    assert not await engine.answers()


async def test_an_unload_fails_what_runs(library: Library, folder: Path):
    engine = await loaded(folder)
    library.go_on.clear()
    asked = asyncio.create_task(body(engine, asks(1, max_tokens=40), COMPLETIONS))
    async with asyncio.timeout(10):
        while not library.jobs:
            await asyncio.sleep(0.002)
    unloading = asyncio.create_task(engine.unload())
    await asyncio.sleep(0.01)
    library.go_on.set()
    with pytest.raises(BackendUnavailable):
        await asked
    await unloading
    with pytest.raises(BackendUnavailable):
        await body(engine, asks(1), COMPLETIONS)
