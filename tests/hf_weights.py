"""SmolLM2 as a Hugging Face folder, made from its GGUF file: what vLLM reads. Nothing is downloaded.

    python tests/hf_weights.py FILE.gguf FOLDER

is run by the interpreter of vLLM's environment, which has transformers.
"""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: vLLM lives in an environment of its own (`make .venv-vllm/.installed`).
VLLM_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
#: `make clean` removes it.
FOLDER = ROOT / "build" / "smollm2-hf"


def has_vllm() -> bool:
    """Whether the environment is there."""
    return (VLLM_PYTHON.parent.parent / ".installed").exists()


def smollm2_folder() -> Path:
    """The folder, made the first time it is asked for: some 20 seconds, 270 MB."""
    from deployments.weights import resolve_weights
    from tests.pool import SMOLLM2

    FOLDER.parent.mkdir(exist_ok=True)
    with open(FOLDER.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not FOLDER.exists():
            subprocess.run([str(VLLM_PYTHON), __file__, resolve_weights(SMOLLM2), str(FOLDER)], check=True)
    return FOLDER


def convert(gguf: Path, folder: Path) -> None:
    """Write the weights of a GGUF file as safetensors, in the type that the CPU computes in."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    unready = folder.with_suffix(".unready")
    shutil.rmtree(unready, ignore_errors=True)
    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent),
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(gguf_file=gguf.name, dequantize=True),
    )
    # It would be taken for a quantised model, which it no longer is.
    model.config.__dict__.pop("quantization_config", None)
    model.save_pretrained(str(unready))
    AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(str(unready))
    unready.rename(folder)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
