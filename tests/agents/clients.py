"""The coding agents and client libraries that `make test-agents` lets talk to a pool: how each is told of the pool.

Each client runs with a home folder of its own, knows one model, and is told to send nothing to anybody else.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: Where `make test-agents` installs the clients.
INSTALLED = ROOT / ".agents"
NODE, PYTHON = INSTALLED / "node_modules", INSTALLED / "python" / "bin"
SCRIPTS = Path(__file__).parent / "scripts"
QUESTION = "Say hello in one short sentence."
#: How many tokens the fake engine answers with. It gives as many as it is asked for, and some clients ask for 64,000.
TOKENS = 6

Command = Callable[[str, str, Path], list[str]]
Environment = Callable[[str, str, Path], Mapping[str, str]]


@dataclass(frozen=True)
class Client:
    """`command` and `environment` are made for the pool's URL, a model's id and the home folder, where files may be."""

    name: str
    package: str
    command: Command
    environment: Environment = field(default=lambda url, model, home: {})

    @property
    def version(self) -> str:
        """The installed version of its package."""
        return version_of(self.package)


@dataclass(frozen=True)
class Ran:
    """How a client's turn went: its exit status (None where it had to be ended), and what it printed."""

    status: int | None
    said: str
    complained: str


def version_of(package: str) -> str:
    """The version of a package of npm or PyPI, as the manifests here have it."""
    folder = Path(__file__).parent
    pinned = dict(json.loads((folder / "package.json").read_text())["dependencies"])
    for file in ("requirements.txt", "requirements-aider.txt"):
        lines = (folder / file).read_text().split()
        pinned |= {line.partition("==")[0].partition("[")[0]: line.partition("==")[2] for line in lines}
    return str(pinned[package])


def run(client: Client, url: str, model: str, home: Path, timeout_s: float) -> Ran:
    """One turn of a client. It and whatever it has started ends with this call."""
    work = home / "work"
    work.mkdir()
    # Whoever looks for another machine than this one finds a proxy that is not there.
    nowhere = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
    environment = {
        "PATH": f"{PYTHON}:{os.environ['PATH']}",
        "HOME": str(home),
        "LANG": "C.UTF-8",
        "TERM": "dumb",
        "DO_NOT_TRACK": "1",
        **nowhere,
        **dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost"),
        **client.environment(url, model, home),
    }
    process = subprocess.Popen(
        client.command(url, model, home),
        cwd=work,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        said, complained = process.communicate(timeout=timeout_s)
        return Ran(process.returncode, said, complained)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, complained = process.communicate()
        return Ran(None, said, complained)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _codex(url: str, model: str, home: Path) -> list[str]:
    folder = home / ".codex"
    folder.mkdir()
    (folder / "config.toml").write_text(
        f"""
model = "{model}"
model_provider = "pool"
check_for_update_on_startup = false
[analytics]
enabled = false
[model_providers.pool]
name = "pool"
base_url = "{url}/v1"
wire_api = "responses"
env_key = "POOL_KEY"
"""
    )
    return [str(NODE / ".bin/codex"), "exec", "--skip-git-repo-check", "--sandbox", "read-only", QUESTION]


def _claude(url: str, model: str, home: Path) -> list[str]:
    return [str(NODE / ".bin/claude"), "--model", model, "--print", QUESTION]


def _claude_environment(url: str, model: str, home: Path) -> dict[str, str]:
    return {
        "ANTHROPIC_BASE_URL": url,
        "ANTHROPIC_API_KEY": "none",
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": model,
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(TOKENS),
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_TELEMETRY": "1",
        "DISABLE_AUTOUPDATER": "1",
        "DISABLE_ERROR_REPORTING": "1",
    }


def _opencode(url: str, model: str, home: Path) -> list[str]:
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "pool",
        "options": {"baseURL": f"{url}/v1", "apiKey": "none"},
        "models": {model: {"name": model, "limit": {"context": 32_768, "output": TOKENS}}},
    }
    config = {"provider": {"pool": provider}, "small_model": f"pool/{model}", "autoupdate": False, "share": "disabled"}
    (home / "opencode.json").write_text(json.dumps(config))
    return [str(NODE / ".bin/opencode"), "run", "--model", f"pool/{model}", QUESTION]


def _opencode_environment(url: str, model: str, home: Path) -> dict[str, str]:
    off = ("MODELS_FETCH", "AUTOUPDATE", "DEFAULT_PLUGINS", "SHARE")
    return {"OPENCODE_CONFIG": str(home / "opencode.json"), **{f"OPENCODE_DISABLE_{each}": "1" for each in off}}


def _continue(url: str, model: str, home: Path) -> list[str]:
    file = home / "continue.yaml"
    file.write_text(
        f"""
name: pool
version: 1.0.0
schema: v1
models:
  - name: {model}
    provider: openai
    model: {model}
    apiBase: {url}/v1
    apiKey: none
    roles: [chat]
"""
    )
    return [str(NODE / ".bin/cn"), "--config", str(file), "--print", QUESTION]


def _aider(url: str, model: str, home: Path) -> list[str]:
    quiet = ["--no-git", "--yes-always", "--no-check-update", "--no-show-model-warnings", "--no-show-release-notes"]
    return [
        *(str(INSTALLED / "aider/bin/aider"), *quiet, "--analytics-disable", "--no-pretty", "--no-detect-urls"),
        *("--openai-api-base", f"{url}/v1", "--openai-api-key", "none"),
        *("--model", f"openai/{model}", "--message", QUESTION),
    ]


def _llm(url: str, model: str, home: Path) -> list[str]:
    (home / "llm").mkdir()
    entry = f"- model_id: {model}\n  model_name: {model}\n  api_base: {url}/v1\n"
    (home / "llm/extra-openai-models.yaml").write_text(entry)
    return [str(PYTHON / "llm"), "--model", model, QUESTION]


def _script(name: str, *arguments: str) -> Command:
    def command(url: str, model: str, home: Path) -> list[str]:
        if name.endswith(".py"):
            return [str(PYTHON / "python"), str(SCRIPTS / name), *arguments, url, model, QUESTION, str(TOKENS)]
        # Node looks for packages in the folders above a script.
        return ["node", shutil.copy(SCRIPTS / name, INSTALLED), *arguments, url, model, QUESTION, str(TOKENS)]

    return command


CLIENTS = (
    Client("codex", "@openai/codex", _codex, lambda url, model, home: {"POOL_KEY": "none"}),
    Client("claude-code", "@anthropic-ai/claude-code", _claude, _claude_environment),
    Client("opencode", "opencode-ai", _opencode, _opencode_environment),
    Client("continue", "@continuedev/cli", _continue, lambda url, model, home: {"CONTINUE_TELEMETRY_ENABLED": "0"}),
    Client("aider", "aider-chat", _aider),
    Client("ai-sdk-responses", "@ai-sdk/openai", _script("ai_sdk.mjs", "responses")),
    Client("ai-sdk-compatible", "@ai-sdk/openai-compatible", _script("ai_sdk.mjs", "compatible")),
    Client("ai-sdk-anthropic", "@ai-sdk/anthropic", _script("ai_sdk.mjs", "anthropic")),
    Client("llm", "llm", _llm, lambda url, model, home: {"OPENAI_API_KEY": "none", "LLM_USER_PATH": str(home / "llm")}),
    Client("pydantic-ai-chat", "pydantic-ai-slim", _script("pydantic_ai_turn.py", "chat")),
    Client("pydantic-ai-responses", "pydantic-ai-slim", _script("pydantic_ai_turn.py", "responses")),
    Client("pydantic-ai-anthropic", "pydantic-ai-slim", _script("pydantic_ai_turn.py", "anthropic")),
    Client("langchain-chat", "langchain-openai", _script("langchain_turn.py", "chat")),
    Client("langchain-responses", "langchain-openai", _script("langchain_turn.py", "responses")),
)
