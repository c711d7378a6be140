"""The flags that Ray reads when it starts: they must be in the environment before it is imported or started."""

from __future__ import annotations

from cluster.config.load import OWN_RAY

#: User code on Serve's own loop and thread halves the cost of a request; gRPC between proxy and ingress halves that of
#: a streamed chunk, and its messages must hold the largest body allowed.
#: The ledger assigns devices to engines, so Ray leaves every process those that it sees itself.
#: Ray would let all its processes yield to anything else on the machine (niceness 15): a server should not.
RAY_FLAGS = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**30),
    "RAY_SERVE_FREEZE_GC_ON_STARTUP": "1",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
    "RAY_worker_niceness": "0",
    "RAY_DEDUP_LOGS": "1",
}

#: Only in a Ray that is the pool's own do replicas stay without their engines by default, since the pool then reserves
#: the devices.
OWN_RAY_FLAGS = RAY_FLAGS | {OWN_RAY: "1"}

#: Set to 0 in the environment, this leaves the public port to Serve's proxy.
DIRECT_INGRESS = "RAY_SERVE_ENABLE_DIRECT_INGRESS"


def direct_ingress_flags(port: int) -> dict[str, str]:
    """With these each ingress runs its own HTTP server on `port`; Serve's proxy must then listen on another one.

    The range holds one port, since Serve excludes its upper end. A new ingress needs that very port, so it is neither
    kept in quarantine after its last user nor held for load balancers, which this machine does not have. Streams that
    run when an ingress stops are waited for all the same.
    """
    return {
        DIRECT_INGRESS: "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(port),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(port + 1),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
        "RAY_SERVE_PORT_QUARANTINE_S": "0",
    }
