"""The public port outlives the ingress: a new one takes it although connections of the last one linger.

With direct ingress every ingress replica has an HTTP server of its own, on a port that Serve's controller gives out.
Serve binds it without SO_REUSEADDR, since it means to take another port of a wide range whenever one is taken. The
public port has no other: connections of a predecessor in TIME_WAIT (60 s) would make the bind fail, and after one
failure the controller never gives that port out again. So the socket of this process is bound with the option.

This replaces a private function of Ray Serve, in the ingress's process only. Where Ray has no such function any more,
everything else works, and only a restarted ingress may have to wait.
"""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger("slotpool.ingress")


def reuse_public_port() -> bool:
    """Let this process's HTTP server take a port that was in use a moment ago. Returns whether Ray allows it."""
    try:
        from ray.serve._private import replica
        from ray.serve._private.http_util import start_asgi_http_server
    except ImportError:
        logger.warning("this version of Ray Serve cannot bind a port again at once; a restarted ingress may be refused")
        return False

    def start(app: Any, http_options: Any, **options: Any) -> Any:
        return start_asgi_http_server(app, http_options, **{**options, "enable_so_reuseport": True})

    replica.start_asgi_http_server = start
    return True
