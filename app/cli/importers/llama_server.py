"""The command line of llama.cpp's server, as keys of a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

#: The flags that become keys, by every spelling.
PATHS = ("-m", "--model")
CONTEXT = ("-c", "--ctx-size")
SLOTS = ("-np", "--parallel")
LAYERS = ("-ngl", "--gpu-layers", "--n-gpu-layers")
FLASH = ("-fa", "--flash-attn")
CACHES = {
    "-ctk": "gguf_type_k",
    "--cache-type-k": "gguf_type_k",
    "-ctv": "gguf_type_v",
    "--cache-type-v": "gguf_type_v",
}
KWARGS = {"-t": "n_threads", "--threads": "n_threads", "-b": "n_batch", "--batch-size": "n_batch"}
ALIAS = ("-a", "--alias")
EMBEDDING = ("--embedding", "--embeddings")
RERANK = ("--rerank", "--reranking")
REPOSITORY, FILE = ("-hf", "-hfr", "--hf-repo"), ("-hff", "--hf-file")
TEMPLATE = ("--chat-template",)
DEVICES = ("-dev", "--device")
SPLIT = ("-ts", "--tensor-split")
LORA = ("--lora", "--lora-scaled")
#: llama-server's own templates that the pool has under the same name.
TEMPLATES = {"chatml": "chatml", "gemma": "gemma", "llama3": "llama3"}

#: What needs no key: the pool does it by itself, always or never. With the number of values that follow.
NEEDLESS = {
    **dict.fromkeys(("--host", "--port"), 1),
    **dict.fromkeys(
        ("--jinja", "-cb", "--cont-batching", "--metrics", "--slots", "--no-webui", "--no-ui", "-v", "--verbose"), 0
    ),
    **dict.fromkeys(("--log-disable", "--no-warmup", "--props", "--offline", "--no-slots", "-kvu", "--kv-unified"), 0),
    **dict.fromkeys(("-ub", "--ubatch-size", "--log-file", "-lv", "--log-verbosity", "--timeout", "-to"), 1),
    **dict.fromkeys(("--threads-http", "--threads-batch", "-tb", "--log-colors", "--cache-reuse"), 1),
}
#: What clients send with each request.
SAMPLING = frozenset(
    (
        "--temp",
        "--temperature",
        "--top-k",
        "--top-p",
        "--min-p",
        "--repeat-penalty",
        "--presence-penalty",
        "--seed",
        "-s",
    )
) | {"--frequency-penalty", "-n", "--n-predict", "--predict", "--samplers", "--dry-multiplier", "--xtc-probability"}
#: Flags without a value that are not among those above.
BARE = frozenset(
    (
        "--mlock",
        "--no-mmap",
        "--mmap",
        "--no-kv-offload",
        "-nkvo",
        "--swa-full",
        "--no-context-shift",
        "--check-tensors",
    )
) | {"--special", "--no-mmproj", "--no-op-offload", "--no-repack", "--context-shift", "--no-cont-batching", "-nocb"}
REASONS = {
    "--mmproj": "not carried over: images need a server of their own",
    "-md": "not carried over: no draft models",
    "--model-draft": "not carried over: no draft models",
    "--api-key": "not carried over: configure api_keys of the pool",
    "--chat-template-file": "not carried over: put the template into prompt_format",
}


class Reading(NamedTuple):
    """The keys of the model, and what must be said of flags: each with the flag that it is about."""

    keys: dict[str, Any]
    notes: list[tuple[str, str]]


def is_llama_server(words: Sequence[str]) -> bool:
    """Whether a command starts llama.cpp's server itself, and not a container or a script that does."""
    return bool(words) and PurePath(words[0]).name.startswith("llama-server")


def read(words: Sequence[str]) -> Reading:
    """The model that a command line serves; its words begin with the program. Pure."""
    flags, notes = _flags(words[1:])
    keys: dict[str, Any] = {}
    path = _last(flags, PATHS)
    if path is not None:
        keys["model_path"] = path
    elif (repository := _last(flags, REPOSITORY)) is not None:
        file = _last(flags, FILE)
        keys["model_path"] = f"hf:{repository.partition(':')[0]}/{file or 'FILE.gguf'}"
        if file is None:
            notes.append((REPOSITORY[2], f"name the file of {repository} in model_path"))
    _device_keys(flags, keys, notes)
    _batch_keys(flags, keys, notes)
    for flag, value in flags:
        if flag in CACHES and value:
            keys[CACHES[flag]] = value
        elif flag in KWARGS and value and value.isdigit():
            keys.setdefault("engine_kwargs", {})[KWARGS[flag]] = int(value)
        elif flag in ALIAS and value:
            keys["aliases"] = [each.strip() for each in value.split(",")]
        elif flag in LORA and value:
            keys.setdefault("gguf_lora", []).extend(_adapter(flag, each) for each in value.split(","))
        elif flag in EMBEDDING:
            keys["type"] = "embedding"
        elif flag in RERANK:
            keys["type"] = "rerank"
        elif flag in TEMPLATE and value in TEMPLATES:
            keys["prompt_format"] = TEMPLATES[value]
        elif flag in TEMPLATE:
            notes.append((flag, f"the template {value!r} is not known here: the file's own is used"))
    return Reading(keys, notes)


def _flags(words: Sequence[str]) -> tuple[list[tuple[str, str | None]], list[tuple[str, str]]]:
    """Flags with their values, and what must be said of those that mean nothing here."""
    known = {
        *PATHS,
        *CONTEXT,
        *SLOTS,
        *LAYERS,
        *CACHES,
        *KWARGS,
        *ALIAS,
        *REPOSITORY,
        *FILE,
        *TEMPLATE,
        *DEVICES,
        *SPLIT,
        *LORA,
    }
    flags: list[tuple[str, str | None]] = []
    notes: list[tuple[str, str]] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        flag, equals, given = word.partition("=")
        value: str | None = given if equals else None
        if not flag.startswith("-"):
            notes.append((word, "not carried over: no flag"))
            continue
        if flag in (*EMBEDDING, *RERANK) or NEEDLESS.get(flag) == 0:
            flags.append((flag, None))
            continue
        # A negative number is a value; `-fa` may stand alone.
        takes = value is None and bool(rest) and not (rest[0].startswith("-") and not rest[0][1:2].isdigit())
        if takes and flag not in BARE and not (flag in FLASH and rest[0] not in ("on", "off", "auto")):
            value = rest.pop(0)
        if flag in known or flag in FLASH:
            flags.append((flag, value))
        elif flag in SAMPLING:
            notes.append((flag, "not carried over: clients send it with each request"))
        elif flag not in NEEDLESS:
            notes.append((flag, REASONS.get(flag, "not carried over: Slotpool has nothing like it")))
    return flags, notes


def _device_keys(flags: list[tuple[str, str | None]], keys: dict[str, Any], notes: list[tuple[str, str]]) -> None:
    layers, split, devices = _last(flags, LAYERS), _last(flags, SPLIT), _last(flags, DEVICES)
    if layers == "0" or devices == "none":
        keys["num_gpus"] = 0
        return
    named = [each[4:] for each in (devices or "").split(",") if each.startswith("CUDA") and each[4:].isdigit()]
    shares = [each for each in (split or "").split(",") if each]
    keys["num_gpus"] = max(1, len(named), sum(each.strip() not in ("0", "0.0") for each in shares))
    if named:
        keys["gpu"] = named
    parts = [part for each in shares if (part := _number(each)) is not None]
    if len(set(parts)) > 1 and keys["num_gpus"] == len(parts) == len(shares):
        keys["gguf_tensor_split"] = parts
    elif len(set(shares)) > 1:
        notes.append((SPLIT[1], f"the shares {split} are not kept: llama.cpp divides by itself"))
    if layers is None:
        notes.append((LAYERS[2], "it is not given: the model is taken to be on a GPU; num_gpus: 0 puts it on the CPU"))
    elif layers.isdigit() and int(layers) < 99:
        keys["gguf_n_gpu_layers"] = int(layers)


def _adapter(flag: str, value: str) -> str | dict[str, Any]:
    path, _, scale = value.rpartition(":")
    factor = _number(scale) if flag == LORA[1] else None
    return value.strip() if factor is None or not path else {"path": path.strip(), "scale": factor}


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _batch_keys(flags: list[tuple[str, str | None]], keys: dict[str, Any], notes: list[tuple[str, str]]) -> None:
    """llama-server's context is that of all slots together, ours is that of each."""
    context, slots, flash = _last(flags, CONTEXT), _last(flags, SLOTS), _last(flags, FLASH)
    count = int(slots) if slots and slots.isdigit() and int(slots) else 1
    keys["target_inflight"] = count
    if slots is None:
        notes.append((SLOTS[1], "it is not given: one slot with all of the context; more slots share a batch"))
    if context and context.isdigit() and int(context):
        keys["gguf_n_ctx"] = max(1, int(context) // count)
        if count > 1:
            notes.append((CONTEXT[1], f"{context} tokens of all slots are {keys['gguf_n_ctx']} of each"))
    if any(flag in FLASH for flag, _ in flags):
        keys["gguf_flash_attn"] = flash or "on"


def _last(flags: list[tuple[str, str | None]], names: Sequence[str]) -> str | None:
    """The value of a flag in any of its spellings; the last one counts, as there."""
    found = [value for flag, value in flags if flag in names and value is not None]
    return found[-1] if found else None
