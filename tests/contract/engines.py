"""The engines under test, by the name that their tests' ids begin with."""

from __future__ import annotations

from tests.contract.engine_ctranslate2 import CTRANSLATE2
from tests.contract.engine_exllamav3 import EXLLAMAV3
from tests.contract.engine_fake import FAKE
from tests.contract.engine_llama_cpp import LLAMA_CPP
from tests.contract.engine_openai_upstream import OPENAI_UPSTREAM
from tests.contract.engine_server_process import SERVER_PROCESS
from tests.contract.engine_vllm import VLLM

ENGINES = {
    entry.name: entry for entry in (LLAMA_CPP, CTRANSLATE2, VLLM, EXLLAMAV3, FAKE, SERVER_PROCESS, OPENAI_UPSTREAM)
}
