"""What the files of models say of them, for the lists that show it: size, age, architecture, quantisation."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from deployments.engines.llama_cpp.gguf import GgufError, read_header
from deployments.weights import weights_at_hand

#: The types of whole files in llama.cpp's words, by `general.file_type`.
FILE_TYPES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    19: "IQ2_XXS",
    20: "IQ2_XS",
    21: "Q2_K_S",
    22: "IQ3_XS",
    23: "IQ3_XXS",
    24: "IQ1_S",
    25: "IQ4_NL",
    26: "IQ3_S",
    27: "IQ3_M",
    28: "IQ2_S",
    29: "IQ2_M",
    30: "IQ4_XS",
    31: "IQ1_M",
    32: "BF16",
    36: "TQ1_0",
    37: "TQ2_0",
    38: "MXFP4_MOE",
}


@dataclass(frozen=True, slots=True)
class ModelFile:
    """One model's file as far as it is known here; `metadata` is that of its GGUF header, without long texts.

    `is_base`: it brings no chat template, so it only continues texts.
    """

    size: int = 0
    modified_at: float = 0.0
    metadata: dict[str, Any] = field(default_factory=dict)
    is_base: bool = False

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    @property
    def quantisation(self) -> str:
        return FILE_TYPES.get(self.metadata.get("general.file_type", -1), "")


#: Of a model whose file is not on this machine, or that has none.
UNKNOWN = ModelFile()


def model_file(model_path: str | None) -> ModelFile:
    """What is known of the file that a configuration names. Blocks for milliseconds, the first time."""
    path = weights_at_hand(model_path)
    if path is None or not path.is_file():
        return UNKNOWN
    try:
        found = path.stat()
    except OSError:
        return UNKNOWN
    return _read(path, found.st_size, found.st_mtime)


@lru_cache(maxsize=1024)
def _read(path: Path, size: int, modified_at: float) -> ModelFile:
    try:
        metadata = read_header(path).metadata if path.suffix == ".gguf" else {}
    except GgufError:
        metadata = {}
    # Short arrays are of the vocabulary as well, and the template is cut.
    kept = {name: value for name, value in metadata.items() if not isinstance(value, list)}
    template = kept.pop("tokenizer.chat_template", None)
    return ModelFile(size, modified_at, kept, is_base=bool(metadata) and not template)
