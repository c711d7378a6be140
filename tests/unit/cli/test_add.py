"""`slotpool add`: a model's configuration from the header of its file."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
import yaml
from click.testing import CliRunner, Result

from app.cli import cli
from app.cli.hub import fetched_header
from app.cli.model_block import Line, insert
from app.cli.output import Failure, Misuse
from app.cli.sizing import Sizing
from cluster.config import load_config
from deployments.engines.llama_cpp.gguf import read_header
from tests.unit.test_memory import METADATA, gguf_file

MIB = 1 << 20
#: A model whose cache takes 64 KiB a token, and whose weights take 64 MiB.
LARGER = {
    **METADATA,
    "llama.block_count": 16,
    "llama.embedding_length": 1024,
    "llama.attention.head_count": 8,
    "llama.attention.head_count_kv": 8,
    "llama.context_length": 40960,
    "general.file_type": 15,
    "tokenizer.chat_template": "{{ messages }}",
}
WEIGHTS = {"a": ((1024, 16384), 0)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "Qwen3 8B.gguf"
    path.write_bytes(gguf_file(LARGER, WEIGHTS, data=64 * MIB))
    return path


def add(*args: str) -> Result:
    return CliRunner().invoke(cli, ["add", *args])


def test_the_yaml_is_a_configuration(file: Path):
    result = add(str(file), "--gpus", "1", "--gpu-memory", "12000")
    assert result.exit_code == 0
    written = yaml.safe_load(result.stdout)
    assert written == {
        "models": {"qwen3-8b": {"model_path": str(file), "num_gpus": 1, "target_inflight": 8, "gguf_n_ctx": 16384}}
    }
    load_config(written, {})
    assert "# llama Q4_K_M, 64 MiB" in result.stdout
    assert "# tokens per slot, of 40960" in result.stdout
    assert "SLOTS" in result.stderr


def test_json_has_everything(file: Path):
    shown = json.loads(add(str(file), "--json", "--id", "q", "--gpus", "2", "--gpu-memory", "3000").output)
    assert shown["model"] == "q"
    assert shown["file"]["has_chat_template"] is True
    assert shown["config"]["target_inflight"] == 4, "fewer slots, for a context that is of use"
    assert shown["config"]["gguf_n_ctx"] == 8192
    assert [each["slots"] for each in shown["fits"]] == [16, 8, 4, 2, 1]


def test_what_fits_on_no_device_goes_on_the_cpu_and_what_fits_on_two_takes_two(file: Path):
    assert json.loads(add(str(file), "--json", "--gpus", "4", "--gpu-memory", "500").output)["config"]["num_gpus"] == 2
    assert json.loads(add(str(file), "--json", "--gpus", "1", "--gpu-memory", "500").output)["config"]["num_gpus"] == 0


def test_sizes_never_exceed_the_memory(file: Path):
    for memory_mib in (800, 2000, 5000, 20000):
        sizing = Sizing(file, 40960, memory_mib, 1)
        assert all(each.memory_mib <= memory_mib for each in sizing.all())
        first = sizing.first()
        assert first is None or first.memory_mib <= memory_mib


def test_an_embedding_model_is_one(tmp_path: Path):
    path = tmp_path / "embed.gguf"
    path.write_bytes(gguf_file({**METADATA, "llama.pooling_type": 1}, {"a": ((8, 1), 0)}, data=64))
    assert json.loads(add(str(path), "--json").output)["config"]["type"] == "embedding"


def test_a_configuration_keeps_its_comments(file: Path, tmp_path: Path):
    pool = tmp_path / "pool.yaml"
    pool.write_text("# mine\nmodels:   # all of them\n    qwen3-8b: {backend: fake}   # a fake\nqueue_max_size: 3\n")
    result = add(str(file), "--to", str(pool), "--gpus", "0")
    assert result.exit_code == 0, result.output
    text = pool.read_text()
    assert text.startswith("# mine\nmodels:   # all of them\n    qwen3-8b-2:\n        model_path:")
    assert "    qwen3-8b: {backend: fake}   # a fake\nqueue_max_size: 3\n" in text
    assert set(load_config({"config": str(pool)}, {}).models) == {"qwen3-8b", "qwen3-8b-2"}
    new = tmp_path / "new.yaml"
    assert add(str(file), "--to", str(new), "--gpus", "0").exit_code == 0
    assert set(load_config({"config": str(new)}, {}).models) == {"qwen3-8b"}


def test_what_cannot_be_added_to_is_refused():
    with pytest.raises(Misuse, match="in one line"):
        insert("models: {a: {backend: fake}}", "b", [Line("backend", "fake")])


def test_what_is_no_model_is_refused(tmp_path: Path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    for source in (tmp_path / "broken.gguf", tmp_path / "none.gguf", tmp_path):
        assert add(str(source)).exit_code == 2


class Hub:
    """A hub that has one file."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.asked: list[str] = []

    def answer(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request.headers["range"])
        last = int(request.headers["range"].rpartition("-")[2])
        part = self.data[: last + 1]
        return httpx.Response(206, content=part, headers={"content-range": f"bytes 0-{len(part)}/{len(self.data)}"})

    def client(self) -> httpx.Client:
        return httpx.Client(transport=httpx.MockTransport(self.answer))


def test_only_the_header_is_fetched_from_the_hub():
    hub = Hub(gguf_file(LARGER, WEIGHTS, data=64 * MIB))
    with fetched_header("a/b/c.gguf", hub.client()) as path:
        assert read_header(path).tensor_bytes == 64 * MIB
        assert path.name == "c.gguf"
        assert path.stat().st_size == len(hub.data)
        assert path.stat().st_blocks * 512 < 20 * MIB
    assert hub.asked == ["bytes=0-16777215"]


def test_a_long_vocabulary_takes_a_second_look():
    words = [f"{index:0100}" for index in range(200_000)]
    hub = Hub(gguf_file({**LARGER, "tokenizer.ggml.tokens": words}, WEIGHTS, data=64 * MIB))
    with fetched_header("a/b/c.gguf", hub.client()) as path:
        assert read_header(path).lengths["tokenizer.ggml.tokens"] == 200_000
    assert len(hub.asked) == 2


def test_what_the_hub_refuses_is_one_line():
    client = httpx.Client(transport=httpx.MockTransport(lambda request: httpx.Response(401)))
    with pytest.raises(Failure, match=r"^hf:a/b/c.gguf could not be read: .*401"), fetched_header("a/b/c.gguf", client):
        pass
    with pytest.raises(Misuse, match="owner, repository and file"), fetched_header("a/b"):
        pass
