"""A thin typed wrapper around the low-level C interface of llama.cpp: one model, one context, one batch.

It owns the native objects and is the only file that touches their pointers. It knows nothing of requests, threads or
asyncio; `decode` and everything that follows it must be called by one thread at a time, while `tokenize` and `piece`
only read the vocabulary and may run anywhere.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.errors import InvalidRequest, ModelUnavailable
from deployments.engines.llama_cpp.library import LoggedErrors, load_library
from deployments.engines.llama_cpp.memory import SPARE_OUTPUTS, cells, context_per_slot, kv_bytes_per_token

#: ggml's type numbers of the KV cache types that can be configured.
KV_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "iq4_nl": 20, "bf16": 30}
FLASH_ATTENTION = {"auto": -1, "off": 0, "on": 1}

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class RuntimeOptions:
    """How to load the model; the meaning of each field is llama.cpp's own."""

    model_path: str
    slots: int
    n_ctx: int | None
    n_threads: int
    n_gpu_layers: int
    flash_attn: str
    type_k: str | None
    type_v: str | None
    n_batch: int
    n_ubatch: int
    #: Files of adapters with their scales, and the devices' shares of the model.
    lora: tuple[tuple[str, float], ...] = ()
    tensor_split: tuple[float, ...] = ()


class Runtime:
    """The loaded model. Make it with `Runtime.open`, then `start` it; `close` frees it, and may be called twice."""

    def __init__(self, lib: Any, model: Any, options: RuntimeOptions) -> None:
        self._lib = lib
        self._options = options
        self._model = model
        self._context: Any = None
        self._vocab = lib.llama_model_get_vocab(model)
        self._pieces: dict[tuple[int, bool], bytes] = {}
        self.vocab_size = int(lib.llama_vocab_n_tokens(self._vocab))
        self.embedding_size = int(lib.llama_model_n_embd(model))
        self.n_ctx_train = int(lib.llama_model_n_ctx_train(model))
        self.n_ctx = self._context_per_slot(options)
        self.n_batch = max(options.n_batch, options.slots)
        #: Outputs of one llama_decode; bounds the logits buffer (n_outputs x vocabulary x 4 bytes).
        self.max_outputs = min(self.n_batch, options.slots + SPARE_OUTPUTS)
        self.offloads = options.n_gpu_layers != 0 and bool(lib.llama_supports_gpu_offload())
        self._batch = _Batch(lib, self.n_batch)
        #: Whether the next decode copies cells between slots first.
        self.has_pending_copies = False

    @property
    def threads(self) -> int:
        """The most threads that may evaluate a batch."""
        return self._options.n_threads

    @classmethod
    def open(cls, options: RuntimeOptions, progress: Callable[[float], None]) -> Runtime:
        """Load weights and vocabulary; blocks for as long as that takes. Raises `ModelUnavailable`, leaving nothing.

        What the model is can be asked then; to evaluate anything, `start` it.
        """
        lib = load_library()
        if not Path(options.model_path).is_file():
            raise ModelUnavailable(f"the model file {Path(options.model_path).name} does not exist")
        params = lib.llama_model_default_params()
        params.n_gpu_layers = options.n_gpu_layers
        if options.tensor_split:
            # The library reads one for each device that it could have.
            shares = (ctypes.c_float * int(lib.llama_max_devices()))(*options.tensor_split)
            params.tensor_split = ctypes.cast(shares, ctypes.POINTER(ctypes.c_float))

        def report(fraction: float, _: object) -> bool:
            progress(float(fraction))
            return True

        params.progress_callback = lib.llama_progress_callback(report)
        with LoggedErrors(options.model_path) as errors:
            model = lib.llama_model_load_from_file(options.model_path.encode(), params)
            if not model:
                raise ModelUnavailable(f"llama.cpp could not load {Path(options.model_path).name}: {errors.reason()}")
        try:
            return cls(lib, model, options)
        except BaseException:
            lib.llama_model_free(model)
            raise

    def start(self) -> None:
        """Make the context; blocks. Raises `ModelUnavailable`; then close it.

        On a device a token is evaluated, too, since its kernels are loaded by that. On a CPU the first request would
        find nothing prepared by it: the weights are in RAM already (docs/measurements.md).
        """
        with LoggedErrors(self._options.model_path, *(path for path, _ in self._options.lora)) as errors:
            try:
                self._new_context(self._options)
                self._add_adapters(self._options.lora)
                if self.offloads:
                    self.warm_up()
            except ModelUnavailable as error:
                raise ModelUnavailable(f"{error.message}: {errors.reason()}") from None

    def close(self) -> None:
        if self._context is not None:
            self._lib.llama_free(self._context)
            self._context = None
        if self._model is not None:
            self._lib.llama_model_free(self._model)
            self._model = None

    # --- what the model is

    def metadata(self, key: str) -> str | None:
        """One value of the GGUF header, as text."""
        size = 1 << 10
        while True:
            buffer = ctypes.create_string_buffer(size)
            needed = self._lib.llama_model_meta_val_str(self._model, key.encode(), buffer, size)
            if needed < 0:
                return None
            if needed < size:
                return buffer.value.decode("utf-8", "replace")
            size = needed + 1

    @property
    def memory_bytes(self) -> int:
        """Weights and KV cache; the compute buffers come on top of it."""
        return int(self._lib.llama_model_size(self._model)) + self._kv_bytes

    def bos_text(self) -> str:
        return self._special_text(self._lib.llama_vocab_bos(self._vocab))

    def eos_text(self) -> str:
        return self._special_text(self._lib.llama_vocab_eos(self._vocab))

    def start_token(self) -> int:
        """What an empty prompt begins with: something must be evaluated."""
        bos = int(self._lib.llama_vocab_bos(self._vocab))
        return bos if bos >= 0 else max(0, int(self._lib.llama_vocab_eos(self._vocab)))

    def is_end(self, token: int) -> bool:
        return bool(self._lib.llama_vocab_is_eog(self._vocab, token))

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        raw = text.encode("utf-8", "replace")
        room = len(raw) + 8
        tokens = (ctypes.c_int32 * room)()
        count = self._lib.llama_tokenize(self._vocab, raw, len(raw), tokens, room, add_special, parse_special)
        if count < 0:
            raise InvalidRequest("the prompt could not be tokenized", param="prompt")
        return list(tokens[:count])

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes of one token; those of a control token are empty unless `special`."""
        known = self._pieces.get((token, special))
        if known is None:
            known = self._pieces[token, special] = self._read_piece(token, special)
        return known

    # --- the KV cache, by slot

    def keep_prefix(self, slot: int, length: int) -> bool:
        """Forget what `slot` holds from position `length` on. False where the architecture cannot: all is forgotten."""
        memory = self._lib.llama_get_memory(self._context)
        if length and self._lib.llama_memory_seq_rm(memory, slot, length, -1):
            return True
        self._lib.llama_memory_seq_rm(memory, slot, -1, -1)
        return length == 0

    def copy_slot(self, source: int, target: int) -> None:
        """Give `target` all that `source` holds; the cells are copied at the next decode."""
        memory = self._lib.llama_get_memory(self._context)
        self._lib.llama_memory_seq_rm(memory, target, -1, -1)
        self._lib.llama_memory_seq_cp(memory, source, target, -1, -1)
        self.has_pending_copies = True

    @property
    def can_cut(self) -> bool:
        """Whether a slot's state, saved and restored, can be cut back to any of its tokens.

        Not where a layer keeps a running state or a window of the last tokens, nor with an index beside the cache:
        nothing has proven those yet.
        """
        lib, model = self._lib, self._model
        if lib.llama_model_is_recurrent(model) or lib.llama_model_is_hybrid(model) or lib.llama_model_n_swa(model):
            return False
        arch = self.metadata("general.architecture") or ""
        return self.metadata(f"{arch}.attention.indexer.head_count") is None

    def state_bytes(self, slot: int) -> int:
        """The size of what `save_state` gives; 0 where the slot has no state that can be saved."""
        return int(self._lib.llama_state_seq_get_size_ext(self._context, slot, 0))

    def save_state(self, slot: int, into: memoryview) -> bool:
        """Write a slot's cells into memory of `state_bytes`; False where that failed. No copy may be pending."""
        assert not self.has_pending_copies
        buffer = (ctypes.c_uint8 * len(into)).from_buffer(into)
        return int(self._lib.llama_state_seq_get_data_ext(self._context, buffer, len(into), slot, 0)) == len(into)

    def restore_state(self, slot: int, state: memoryview, length: int) -> bool:
        """Put a state of `length` tokens in the place of what a slot holds. No copy may be pending.

        False where it was not taken, or is not the state of these tokens from the first on; the slot is then empty.
        """
        assert not self.has_pending_copies
        data = np.frombuffer(state, np.uint8)
        pointer = ctypes.cast(data.ctypes.data, ctypes.POINTER(ctypes.c_uint8))
        read = int(self._lib.llama_state_seq_set_data_ext(self._context, pointer, len(data), slot, 0))
        if read == len(data) and self.holds(slot, length):
            return True
        self.keep_prefix(slot, 0)
        return False

    def holds(self, slot: int, length: int) -> bool:
        """Whether a slot's cells are those of `length` tokens, from the first on."""
        memory = self._lib.llama_get_memory(self._context)
        first = int(self._lib.llama_memory_seq_pos_min(memory, slot))
        return (first, int(self._lib.llama_memory_seq_pos_max(memory, slot))) == (0, length - 1)

    # --- one step

    def add(self, slot: int, position: int, tokens: Sequence[int], *, outputs: str) -> range:
        """Append tokens to the next batch; `outputs` is "none", "last" or "all". Returns their rows in the batch."""
        return self._batch.add(slot, position, tokens, outputs)

    @property
    def batched(self) -> int:
        return self._batch.size

    def decode(self) -> int:
        """Run the batch and empty it. Returns llama.cpp's code: 0 done, 1 no room in the cache, others failures."""
        code = int(self._lib.llama_decode(self._context, self._batch.native()))
        self._batch.clear()
        self.has_pending_copies = False
        return code

    def discard(self) -> None:
        self._batch.clear()

    def set_threads(self, threads: int) -> None:
        """How many threads evaluate the next batches."""
        self._lib.llama_set_n_threads(self._context, threads, threads)

    def warm_up(self) -> None:
        """Evaluate one token, so that the first request does not pay for what a device does once."""
        self.add(0, 0, (self.start_token(),), outputs="last")
        if self.decode() != 0:
            raise ModelUnavailable("the model loads but cannot evaluate a token")
        self.keep_prefix(0, 0)

    def logits(self, row: int) -> Logits:
        """A view of the scores of one row of the last batch, valid until the next decode."""
        pointer = self._lib.llama_get_logits_ith(self._context, row)
        return np.ctypeslib.as_array(pointer, (self.vocab_size,))

    def want_embeddings(self, wanted: bool) -> None:
        """Whether the next decodes also give each output's embedding."""
        self._lib.llama_set_embeddings(self._context, wanted)

    def embeddings(self, rows: range) -> Logits:
        """A copy of the hidden states of some rows of the last batch, one row each."""
        pointers = [self._lib.llama_get_embeddings_ith(self._context, row) for row in rows]
        return np.stack([np.ctypeslib.as_array(pointer, (self.embedding_size,)) for pointer in pointers])

    @property
    def native(self) -> tuple[Any, Any]:
        """Library and vocabulary, for the samplers."""
        return self._lib, self._vocab

    # --- private

    def _read_piece(self, token: int, special: bool) -> bytes:
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = self._lib.llama_token_to_piece(self._vocab, token, buffer, size, 0, special)
            if count >= 0:
                return buffer.raw[:count]
            size = -count

    def _special_text(self, token: int) -> str:
        return self.piece(token, special=True).decode("utf-8", "replace") if token >= 0 else ""

    def _context_per_slot(self, options: RuntimeOptions) -> int:
        per_token = self._kv_bytes_per_token(options)
        chosen = context_per_slot(
            options.n_ctx,
            trained=self.n_ctx_train,
            slots=options.slots,
            kv_bytes_per_token=per_token,
            weight_bytes=int(self._lib.llama_model_size(self._model)),
        )
        self._kv_bytes = int(cells(chosen) * options.slots * per_token)
        return chosen

    def _kv_bytes_per_token(self, options: RuntimeOptions) -> float:
        arch = self.metadata("general.architecture") or ""
        lib, model = self._lib, self._model
        head = int(lib.llama_model_n_embd(model)) // max(1, int(lib.llama_model_n_head(model)))
        keys = int(self.metadata(f"{arch}.attention.key_length") or head)
        values = int(self.metadata(f"{arch}.attention.value_length") or head)
        heads = int(lib.llama_model_n_layer(model)) * int(lib.llama_model_n_head_kv(model))
        return kv_bytes_per_token(heads, keys, values, options.type_k, options.type_v)

    def _new_context(self, options: RuntimeOptions) -> None:
        params = self._lib.llama_context_default_params()
        params.n_seq_max = options.slots
        params.n_ctx = cells(self.n_ctx) * options.slots
        params.n_batch = self.n_batch
        params.n_ubatch = min(options.n_ubatch, self.n_batch)
        params.n_outputs_max = self.max_outputs
        params.n_threads = params.n_threads_batch = options.n_threads
        params.flash_attn_type = FLASH_ATTENTION[options.flash_attn]
        if options.type_k:
            params.type_k = KV_TYPES[options.type_k]
        if options.type_v:
            params.type_v = KV_TYPES[options.type_v]
        # One stream of cells per sequence instead of a unified buffer: a token then attends to its own sequence only.
        # What a unified one costs grows with the contexts that idle slots retain (docs/measurements.md).
        params.kv_unified = False
        params.no_perf = True
        self._context = self._lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise ModelUnavailable(f"llama.cpp could not make a context of {options.slots} x {self.n_ctx} tokens")

    def _add_adapters(self, lora: tuple[tuple[str, float], ...]) -> None:
        """Lay adapters over the weights, for all that is evaluated. They are freed with the model."""
        lib = self._lib
        adapters = []
        for path, _ in lora:
            adapter = lib.llama_adapter_lora_init(self._model, path.encode())
            if not adapter:
                raise ModelUnavailable(f"llama.cpp could not use the adapter {Path(path).name}")
            adapters.append(adapter)
        if adapters:
            native = (lib.llama_adapter_lora_p_ctypes * len(adapters))(*adapters)
            scales = (ctypes.c_float * len(adapters))(*(scale for _, scale in lora))
            if lib.llama_set_adapters_lora(self._context, native, len(adapters), scales) != 0:
                raise ModelUnavailable("llama.cpp could not lay the adapters over the model")


class _Batch:
    """A `llama_batch` over arrays of our own, so that a chunk of a prompt is a slice assignment."""

    def __init__(self, lib: Any, capacity: int) -> None:
        self.size = 0
        self._tokens = np.zeros(capacity, np.int32)
        self._positions = np.zeros(capacity, np.int32)
        self._counts = np.ones(capacity, np.int32)
        self._slots = np.zeros(capacity, np.int32)
        self._wanted = np.zeros(capacity, np.int8)
        base = self._slots.ctypes.data
        self._slot_pointers = base + 4 * np.arange(capacity, dtype=np.uint64)
        self._native = lib.llama_batch()
        for name, array in (
            ("token", self._tokens),
            ("pos", self._positions),
            ("n_seq_id", self._counts),
            ("seq_id", self._slot_pointers),
            ("logits", self._wanted),
        ):
            kind = dict(lib.llama_batch._fields_)[name]
            setattr(self._native, name, ctypes.cast(array.ctypes.data, kind))

    def add(self, slot: int, position: int, tokens: Sequence[int], outputs: str) -> range:
        rows = slice(self.size, self.size + len(tokens))
        self._tokens[rows] = tokens
        self._positions[rows] = np.arange(position, position + len(tokens))
        self._slots[rows] = slot
        self._wanted[rows] = outputs == "all"
        if outputs == "last":
            self._wanted[rows.stop - 1] = 1
        self.size = rows.stop
        return range(rows.start, rows.stop)

    def native(self) -> Any:
        self._native.n_tokens = self.size
        return self._native

    def clear(self) -> None:
        self.size = 0
