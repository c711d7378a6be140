"""A server that does as its options say, well or badly: what a managed server may meet, without a model.

python tests/commands/scripted_server.py --port 8080 [--print MIB] [--ready-after S] [--exit STATUS] …
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

STARTED = time.monotonic()
#: What was asked of it, in order.
asked: list[str] = []


class Handler(BaseHTTPRequestHandler):
    options: argparse.Namespace
    hangs = False
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        while self.hangs:
            time.sleep(1)
        is_ready = time.monotonic() >= STARTED + self.options.ready_after
        self._answer(200 if is_ready else 503, {"asked": asked, "arguments": sys.argv, "pid": os.getpid()})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])) or b"{}")
        asked.append(self.path)
        if self.path == "/hang":
            Handler.hangs = True
        if self.path.endswith("memory_occupation"):
            self._answer(500 if self.options.insomniac else 200, {})
        elif body.get("stream"):
            self._stream(body)
        else:
            message = {"role": "assistant", "content": json.dumps(body)}
            self._answer(200, {"model": body["model"], "choices": [{"index": 0, "message": message}]})

    def _stream(self, body: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        for index in range(self.options.tokens):
            if index == self.options.die_at:
                os._exit(3)
            choice = {"index": 0, "delta": {"content": f"{index} "}, "finish_reason": None}
            self._event({"model": body["model"], "choices": [choice]})
            time.sleep(0.02)
        self._event({"model": body["model"], "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        self._event({"choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": self.options.tokens}})
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def _event(self, chunk: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        self.wfile.flush()

    def _answer(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--print", type=int, default=0, help="MiB of output before it listens")
    parser.add_argument("--ready-after", type=float, default=0.0)
    parser.add_argument("--exit", type=int, help="end with this status instead of listening")
    parser.add_argument("--stubborn", action="store_true", help="do not end when told to")
    parser.add_argument("--child", action="store_true", help="start a process of its own")
    parser.add_argument("--insomniac", action="store_true", help="refuse to sleep")
    parser.add_argument("--tokens", type=int, default=5)
    parser.add_argument("--die-at", type=int, help="end in the middle of a stream")
    options, _ = parser.parse_known_args()
    if options.stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    line = "x" * 1023 + "\n"
    for _ in range(options.print * 1024):
        sys.stdout.write(line)
    sys.stdout.write("an end without a line")
    sys.stdout.flush()
    if options.exit is not None:
        sys.exit(options.exit)
    if options.child:
        subprocess.Popen(["sleep", "1000"])
    Handler.options = options
    ThreadingHTTPServer(("127.0.0.1", options.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
