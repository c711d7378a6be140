"""The clients for Node over real Serve: those of OpenAI, Anthropic and Ollama, each with a file of Node's own tests.

npm installs them once, into `build/`, which `make clean` removes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pool import Pool, fake, running_pool, smollm2

SCRIPTS = Path(__file__).parent / "node"
INSTALLED = Path(__file__).parents[2] / "build" / "node-clients"


@pytest.fixture(scope="module")
def node() -> Path:
    """The folder in which the clients are installed, with the tests beside them."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("there is no Node.js with npm here")
    wanted, stamp = SCRIPTS / "package.json", INSTALLED / "installed.json"
    if not stamp.exists() or stamp.read_bytes() != wanted.read_bytes():
        INSTALLED.mkdir(parents=True, exist_ok=True)
        shutil.copy(wanted, INSTALLED)
        command = ["npm", "install", "--no-package-lock", "--no-audit", "--no-fund"]
        done = subprocess.run(command, cwd=INSTALLED, capture_output=True, text=True, timeout=180)
        if done.returncode:
            pytest.skip(f"npm could not install the clients: {done.stderr.strip()[-300:]}")
        shutil.copy(wanted, stamp)
    for script in SCRIPTS.glob("*.mjs"):
        shutil.copy(script, INSTALLED)
    return INSTALLED


@pytest.fixture(scope="module")
def pool(port: int) -> Iterator[Pool]:
    models = {"words": fake(tokens=5, tokens_per_s=200), "smol": smollm2(num_cpus=0, target_inflight=4)}
    with running_pool(port, {"models": models}) as pool:
        yield pool
        pool.check()


@pytest.mark.parametrize("client", ["openai", "anthropic", "ollama"])
def test_a_client_for_node_gets_what_it_knows(node: Path, pool: Pool, client: str):
    environment = {"PATH": os.environ["PATH"], "HOME": str(node), "POOL_URL": pool.url}
    done = subprocess.run(
        ["node", "--test", f"{client}.test.mjs"],
        cwd=node,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
