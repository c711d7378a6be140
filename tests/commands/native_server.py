"""llama.cpp's own HTTP server as a command: what a managed or an external server is in the tests with real weights.

python tests/commands/native_server.py --port 8080 --model FILE.gguf --parallel 4
"""

from __future__ import annotations

import argparse
import signal

import xllamacpp

#: Tokens of context for each sequence.
CONTEXT = 2048


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--alias", default="")
    parser.add_argument("--parallel", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    # Tokens that are evaluated at once: between two such batches it lets go of whoever has left.
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    params = xllamacpp.CommonParams()
    params.model.path = options.model
    params.hostnames = ["127.0.0.1"]
    params.port = options.port
    params.n_parallel = options.parallel
    params.n_ctx = CONTEXT * options.parallel
    params.n_batch = params.n_ubatch = options.batch
    params.cpuparams.n_threads = options.threads
    if options.alias:
        params.model_alias = {options.alias}
    # It serves from threads of its own, for as long as it lives.
    server = xllamacpp.Server(params)
    print("listening on", server.listening_address, flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
