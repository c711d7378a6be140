"""Direct ingress: the flags that Ray Serve reads, and the one private function of it that is replaced."""

from __future__ import annotations

import asyncio
import inspect
import socket
import subprocess
import sys

import pytest

from app.cli import main
from app.cli.flags import RAY_FLAGS, direct_ingress_flags
from deployments.public_port import reuse_public_port


def test_canary_serve_starts_its_servers_through_the_function_that_is_replaced():
    """Fails where a new Ray would leave a killed ingress's port unusable for a minute, or for ever."""
    from ray.serve._private import http_util, replica

    parameters = list(inspect.signature(http_util.start_asgi_http_server).parameters)
    assert parameters == ["app", "http_options", "event_loop", "enable_so_reuseport"]
    assert replica.start_asgi_http_server is http_util.start_asgi_http_server
    assert "start_asgi_http_server(" in inspect.getsource(replica.Replica._maybe_start_direct_ingress_servers)


async def test_a_port_with_lingering_connections_is_taken_again(monkeypatch: pytest.MonkeyPatch):
    from ray.serve._private import http_util, replica
    from ray.serve.config import HTTPOptions

    monkeypatch.setattr(replica, "start_asgi_http_server", http_util.start_asgi_http_server)
    assert reuse_public_port()
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        # The server closes first, as one that dies does: its end of the connection lingers.
        listener.accept()[0].close()
        client.close()
    with socket.socket() as plain, pytest.raises(OSError, match="in use"):
        plain.bind(("127.0.0.1", port))

    async def app(scope: object, receive: object, send: object) -> None:
        raise AssertionError("nobody asks")

    loop = asyncio.get_running_loop()
    options = HTTPOptions(host="127.0.0.1", port=port)
    task, server = await replica.start_asgi_http_server(app, options, event_loop=loop, enable_so_reuseport=False)
    while not server.started:
        await asyncio.sleep(0.01)
    with socket.create_connection(("127.0.0.1", port)):
        pass
    server.should_exit = True
    await task


def test_serve_reads_every_flag_of_direct_ingress():
    """The range that Serve gives ports from holds the public one and no other."""
    code = (
        "from ray.serve._private import constants as c, node_port_manager as n\n"
        "ports = n.PortAllocator(c.RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT, c.RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT,"
        " 'HTTP', 'node')._available_ports\n"
        "print(c.RAY_SERVE_ENABLE_DIRECT_INGRESS, ports, c.RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S,"
        " c.RAY_SERVE_PORT_QUARANTINE_S)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env={**direct_ingress_flags(8123)}, capture_output=True, text=True, check=True
    )
    assert result.stdout.split("\n")[0] == "True [8123] 0.0 0.0"


def test_the_flags_can_be_evaluated_by_a_shell(capsys: pytest.CaptureFixture[str]):
    main(["flags", "--port", "8100"])
    printed = capsys.readouterr().out
    shell = subprocess.run(
        ["sh", "-c", f"{printed}\nenv"], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=True
    )
    exported = dict(line.split("=", 1) for line in shell.stdout.splitlines())
    wanted = RAY_FLAGS | direct_ingress_flags(8100)
    assert {name: exported[name] for name in wanted} == wanted
    assert "SLOTPOOL_PACE_CONTROLLER" not in exported, "a cluster that is shared keeps its own pace"


def test_the_command_line_sets_its_flags_before_ray_is_imported():
    """Ray and Serve read them while they are imported."""
    code = "import sys, app.cli; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
