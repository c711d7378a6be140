"""SmolLM2 for CTranslate2, made from the GGUF file that is there: no PyTorch, no second download.

A GGUF file keeps a Llama's queries and keys in the order of interleaved rotary embeddings, which CTranslate2 knows as
well, so that every tensor is taken as it is. What `ct2-transformers-converter --copy_files` would lay beside the
weights, the tokenizer and the chat template, is written from the file's header.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deployments.weights import resolve_weights
from tests.pool import SMOLLM2

#: Kept from one run of the tests to the next; `make clean` removes it.
CACHE = Path(__file__).parents[1] / "build" / "smollm2-ct2"


def converted(quantization: str = "int8") -> Path:
    """The folder of the converted model. Takes some seconds the first time."""
    folder = CACHE.with_name(f"{CACHE.name}-{quantization}")
    if not (folder / "model.bin").exists():
        from gguf import GGUFReader

        unready = folder.with_name(folder.name + ".unready")
        unready.mkdir(parents=True, exist_ok=True)
        reader = GGUFReader(resolve_weights(SMOLLM2))
        _write_tokenizer(reader, unready)
        _write_weights(reader, unready, quantization)
        unready.rename(folder)
    return folder


def _write_weights(reader: Any, folder: Path, quantization: str) -> None:
    from ctranslate2.converters import utils
    from ctranslate2.specs import common_spec, transformer_spec
    from gguf.quants import dequantize

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        _value(reader, "llama.block_count"),
        _value(reader, "llama.attention.head_count"),
        activation=common_spec.Activation.SWISH,
        pre_norm=True,
        ffn_glu=True,
        rms_norm=True,
        rotary_dim=0,
        rotary_interleave=True,
        rotary_base=_value(reader, "llama.rope.freq_base"),
        num_heads_kv=_value(reader, "llama.attention.head_count_kv"),
    )

    def weights(name: str) -> Any:
        return dequantize(tensors[f"{name}.weight"].data, tensors[f"{name}.weight"].tensor_type)

    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = weights("token_embd")
    decoder.projection.weight = weights("output" if "output.weight" in tensors else "token_embd")
    decoder.layer_norm.gamma = weights("output_norm")
    for number, layer in enumerate(decoder.layer):
        block = f"blk.{number}."
        attention, ffn = layer.self_attention, layer.ffn
        attention.layer_norm.gamma = weights(block + "attn_norm")
        parts = [common_spec.LinearSpec() for _ in range(3)]
        for part, name in zip(parts, ("attn_q", "attn_k", "attn_v"), strict=True):
            part.weight = weights(block + name)
        utils.fuse_linear(attention.linear[0], parts)
        attention.linear[1].weight = weights(block + "attn_output")
        ffn.layer_norm.gamma = weights(block + "ffn_norm")
        ffn.linear_0.weight = weights(block + "ffn_gate")
        ffn.linear_0_noact.weight = weights(block + "ffn_up")
        ffn.linear_1.weight = weights(block + "ffn_down")
    tokens = _value(reader, "tokenizer.ggml.tokens")
    spec.register_vocabulary(tokens)
    spec.config.bos_token = tokens[_value(reader, "tokenizer.ggml.bos_token_id")]
    spec.config.eos_token = tokens[_value(reader, "tokenizer.ggml.eos_token_id")]
    spec.config.unk_token = tokens[_value(reader, "tokenizer.ggml.unknown_token_id")]
    spec.config.layer_norm_epsilon = _value(reader, "llama.attention.layer_norm_rms_epsilon")
    spec.validate()
    spec.optimize(quantization=quantization)
    spec.save(str(folder))


def _write_tokenizer(reader: Any, folder: Path) -> None:
    """GPT-2's byte-level BPE, in which each digit stands alone."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = _value(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _value(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    control = [
        token for token, kind in zip(tokens, _value(reader, "tokenizer.ggml.token_type"), strict=True) if kind == 3
    ]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": tokens[_value(reader, "tokenizer.ggml.bos_token_id")],
        "eos_token": tokens[_value(reader, "tokenizer.ggml.eos_token_id")],
        "model_max_length": _value(reader, "llama.context_length"),
        "chat_template": _value(reader, "tokenizer.chat_template"),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _value(reader: Any, key: str) -> Any:
    return reader.fields[key].contents()
