"""The commands that talk to a pool, over a scripted one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from app.cli import COMMANDS, main
from app.cli.pool import events_of
from tests.unit.cli.scripted_pool import ScriptedPool, change, error, event, log_of, status, stream

MODELS = {
    "data": [
        {"id": "coder", "status": "loaded", "backend": "llama_cpp", "execution_mode": "gpu", "slots": 8,
         "context_length": None, "aliases": ["c", "[bold]"], "capabilities": ["chat"]},
        {"id": "writer\x1b[2J", "status": "unloaded", "backend": "llama_cpp", "execution_mode": "gpu", "slots": 8},
    ]
}  # fmt: skip
BECAUSE = {"rule": "bound", "waiter": "9f", "request": "req-1", "bound_in_s": 1.25, "cost_s": 4.0, "victims": ["u"]}


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> ScriptedPool:
    for variable in ("SLOTPOOL_URL", "SLOTPOOL_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    return ScriptedPool()


def test_models_as_a_table_and_as_json(pool: ScriptedPool):
    pool.on("GET /v1/models", MODELS)
    lines = pool.run("models").output.splitlines()
    assert lines[0].split() == ["MODEL", "STATUS", "BACKEND", "RUNS", "ON", "SLOTS", "CONTEXT", "ALIASES", "CAN"]
    assert lines[1].split() == ["coder", "loaded", "llama_cpp", "gpu", "8", "c,", "[bold]", "chat"]
    assert lines[2].split()[0] == "writer[2J", "no control character reaches the terminal"
    assert json.loads(pool.run("models", "--json").output) == MODELS["data"]


def test_status_tells_who_runs_and_who_waits(pool: ScriptedPool):
    loaded = {"state": "loaded", "ready": 1, "leases": 3, "memory_mib": 2048, "load_s": 3.912}
    failed = {"state": "failed", "queued": 2, "last_error": "no such file\nTraceback"}
    pool.on("GET /v1/status", status(coder=loaded, writer=failed))
    lines = pool.run("status").output.splitlines()
    assert lines[0].startswith("http://127.0.0.1:8000: gpu mode, 0 requests running, 0 queued")
    assert lines[2].split() == ["coder", "loaded", "1", "3/8", "0", "2.0", "GiB", "3.91", "s"]
    assert lines[3].split() == ["writer", "failed", "0", "0/0", "2", "no", "such", "file"]
    assert json.loads(pool.run("status", "--json").output)["ledger"]["models"]["coder"]["leases"] == 3


def test_ps_lists_replicas(pool: ScriptedPool):
    pool.on("GET /v1/status", status(coder={"state": "loaded", "leases": 2}))
    assert pool.run("ps").output.splitlines()[1].split() == [
        "coder", "coder-u", "READY", "2/8", "0123456789ab", "7", "10", "s",
    ]  # fmt: skip
    assert json.loads(pool.run("ps", "--json").output)[0]["state_s"] == 10.0
    pool.on("GET /v1/status", status())
    assert "No replica runs" in pool.run("ps").output


def test_a_status_that_is_watched_follows_the_events(pool: ScriptedPool, monkeypatch: pytest.MonkeyPatch):
    """Also beyond the end of a stream: it goes on behind what it has seen."""
    monkeypatch.setattr("app.cli.pool.RETRY_S", 0.0)
    monkeypatch.setattr("app.cli.commands.status.PAUSE_S", 0.0)
    later = [change(version, "model", "coder") for version in (2000, 2001)]
    pool.on("GET /v1/admin/events", log_of(*later, begin=0))
    asked: list[str] = []

    def breaks(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.path)
        if len(asked) > 2:
            raise httpx.ReadError("gone")
        return httpx.Response(200, json=status(coder={}))

    pool.on("GET /v1/status", breaks)
    result = pool.run("status", "--watch", "--json")
    assert result.exit_code == 3
    assert result.output.count('"execution_mode"') == 2
    seen = [each.headers.get("last-event-id") for each in pool.asked if each.url.path == "/v1/admin/events"]
    assert seen == [None, "e-0"]


def test_a_watched_pool_that_is_gone_is_looked_for_but_not_for_ever(
    pool: ScriptedPool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("app.cli.pool.RETRY_S", 0.0)
    pool.on("GET /v1/admin/events", log_of(change(1, "model", "coder")))
    result = pool.run("events")
    assert result.exit_code == 3
    assert "tells nothing any more" in result.output
    assert len(pool.asked) == 31


def test_who_may_not_follow_looks_from_time_to_time(pool: ScriptedPool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("app.cli.commands.status.LOOK_S", 0.0)
    pool.on("GET /v1/admin/events", lambda request: error(403, "this route needs an admin key"))
    answers = [httpx.Response(200, json=status(coder={})), error(503, "gone")]
    pool.on("GET /v1/status", lambda request: answers.pop(0))
    result = pool.run("status", "--watch")
    assert result.exit_code == 1
    assert "coder" in result.output


def test_load_unload_and_pin(pool: ScriptedPool):
    pool.on("POST /v1/admin/models/coder/load", {"status": "loaded", "model": "coder", "loaded_replicas": 1})
    pool.on("POST /v1/admin/models/coder/unload", {"status": "unloaded", "model": "coder"})
    pool.on("PATCH /v1/admin/models/coder", {"name": "coder"})
    result = pool.run("load", "coder", "--set", "gguf_n_ctx=2048", "--set", "gguf_type_k=null", "--replicas", "2")
    assert result.output == "Loading coder …\ncoder is loaded, with 1 replica(s).\n"
    assert json.loads(pool.asked[-1].content) == {"gguf_n_ctx": 2048, "gguf_type_k": None, "replicas": 2}
    assert json.loads(pool.run("load", "coder", "--json").output)["loaded_replicas"] == 1
    assert pool.run("unload", "coder").output.endswith("coder is unloaded.\n")
    assert pool.run("pin", "coder").output.endswith("coder is pinned.\n")
    assert [json.loads(each.content) for each in pool.asked if each.method == "PATCH"] == [{"pinned": True}]
    assert pool.run("pin", "--off", "coder").output == "coder is no longer pinned.\n"
    assert pool.run("load", "coder", "--set", "nonsense").exit_code == 2


def test_events_are_sentences(pool: ScriptedPool):
    swap = change(2, "swap", "writer", victims=["u"], reason="bound", because=BECAUSE)
    pool.on("GET /v1/admin/events", log_of(change(1, "model", "coder", state="loaded"), swap))
    result = pool.run("events", "--no-follow")
    assert [line.partition("  ")[2] for line in result.output.splitlines()] == [
        "coder is loaded.",
        "writer gets the room of 1 replica, because request req-1 must not wait much longer (its bound is 1.2 s away), "
        "which costs those who give way 4.0 request-seconds.",
    ]
    assert json.loads(pool.run("events", "--no-follow", "--last", "1", "--json").output) == swap
    assert pool.run("events", "--no-follow", "--model", "coder").output.count("\n") == 1


def test_why_explains_a_model_and_a_request(pool: ScriptedPool):
    drained = change(2, "replica", "coder", cause="quiesced", devices=[0], reason="bound", because=BECAUSE)
    pool.on("GET /v1/status", status(coder={"queued": 1, "waiting_since": 95.0}, writer={"state": "loaded"}))
    pool.on("GET /v1/admin/events", log_of(change(1, "lease", "coder", leases=1), drained))
    lines = pool.run("why", "coder").output.splitlines()
    assert lines[0] == "coder is unloaded; 1 request waits for it, the first for 5.0 s."
    assert "coder takes nothing new and ends what runs on device 0, because request req-1 must not" in lines[1]
    assert pool.run("why", "req-1").output.splitlines() == lines[1:]
    assert pool.run("why", "9f").output.splitlines() == lines[1:]
    assert json.loads(pool.run("why", "req-1", "--json").output) == {"model": None, "changes": [drained]}
    assert pool.run("why", "req-2").exit_code == 1
    ended = change(3, "request", "coder", id="9f", trace="req-1", status=200, ttft_s=1.5)
    pool.on("GET /v1/admin/events", log_of(drained, ended))
    assert (
        pool.run("why", "req-1")
        .output.splitlines()[1]
        .endswith("Request req-1 to coder ended with 200: it had its first token after 1.50 s.")
    )


def test_one_question_is_answered_as_it_comes(pool: ScriptedPool):
    pool.on(
        "POST /v1/chat/completions",
        stream(
            ": queued position=1\n\n",
            'data: {"choices": [{"delta": {"role": "assistant"}}]}\n\n',
            'data: {"choices": [{"delta": {"content": "Hel\\u001b[2J"}}]}\n\n',
            'data: {"choices": [{"delta": {"content": "lo"}}]}\n\n',
            'data: {"choices": [], "usage": {"completion_tokens": 2}}\n\n',
            "data: [DONE]\n\n",
        ),
    )
    result = pool.run("chat", "coder", "-m", "Hi", "--system", "Be kind.", "--temperature", "0")
    assert result.output == "Hel[2Jlo\n"
    body = json.loads(pool.asked[-1].content)
    assert body["messages"] == [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert body["temperature"] == 0
    assert pool.run("chat", "coder", input="Hi there").output == "Hel[2Jlo\n"
    assert pool.run("chat", "coder", input="").exit_code == 2


def test_a_stream_that_fails_says_why(pool: ScriptedPool):
    pool.on("POST /v1/chat/completions", stream('data: {"error": {"message": "the engine died"}}\n\n'))
    result = pool.run("chat", "coder", "-m", "Hi")
    assert (result.exit_code, result.output.strip()) == (1, "Error: the engine died")


def test_the_only_model_needs_no_name(pool: ScriptedPool):
    pool.on("GET /v1/models", {"data": MODELS["data"][:1]})
    pool.on("POST /v1/chat/completions", stream('data: {"choices": [{"delta": {"content": "Hello"}}]}\n\n'))
    assert pool.run("chat", "-m", "Hi").output == "Hello\n"
    pool.on("GET /v1/models", MODELS)
    assert "there are coder, writer" in pool.run("chat", "-m", "Hi").output


def test_a_key_is_shown_to_the_pool_and_to_nobody_else(pool: ScriptedPool, tmp_path: Path):
    pool.on("GET /v1/models", lambda request: error(401, "a valid API key is required"))
    secret = tmp_path / "key"
    secret.write_text("from-file\n")
    result = pool.run("models", env={"SLOTPOOL_API_KEY": "from-env"})
    assert pool.asked[-1].headers["authorization"] == "Bearer from-env"
    assert result.exit_code == 1
    assert "SLOTPOOL_API_KEY" in result.output
    assert "from-env" not in result.output
    pool.run("models", "--key-file", str(secret), env={"SLOTPOOL_API_KEY": "from-env"})
    assert pool.asked[-1].headers["authorization"] == "Bearer from-file"
    pool.run("models")
    assert "authorization" not in pool.asked[-1].headers


def test_the_pool_is_found_by_option_and_environment(pool: ScriptedPool):
    pool.on("GET /v1/models", {"data": []})
    pool.run("models", "--url", "http://127.0.0.1:9/v1/")
    assert str(pool.asked[-1].url) == "http://127.0.0.1:9/v1/models"
    pool.run("models", env={"SLOTPOOL_URL": "http://box:1"})
    assert pool.asked[-1].url.host == "box"
    assert pool.run("models", "--url", "box").exit_code == 2


@pytest.mark.parametrize(
    ("args", "code", "line"),
    [
        (["models", "--url", "http://127.0.0.1:1"], 3, "slotpool: no pool answers at http://127.0.0.1:1"),
        (["load"], 2, "slotpool: Missing argument 'MODEL'. (see slotpool load --help)"),
        (["nonsense"], 2, "slotpool: No such command 'nonsense'."),
        (["models", "--key-file", "/no/such/file"], 2, "slotpool: the key file /no/such/file cannot be read"),
    ],
)
def test_what_goes_wrong_is_one_line(args: list[str], code: int, line: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main(args)
    shown = capsys.readouterr()
    assert end.value.code == code
    assert shown.out == ""
    assert shown.err.startswith(line)
    assert shown.err.count("\n") == 1


def test_help_needs_nothing_heavy():
    code = (
        "import sys, contextlib, io\nfrom app.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()): main(['--help'])\n"
        "print([name for name in ('ray', 'pydantic', 'httpx', 'rich', 'yaml') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


def test_every_command_has_help(pool: ScriptedPool):
    for name in COMMANDS:
        result = pool.run(name, "--help")
        assert result.exit_code == 0, name
        assert result.output.startswith(f"Usage: slotpool {name}")


def test_shells_complete_commands_and_models(pool: ScriptedPool):
    assert "_SLOTPOOL_COMPLETE=bash_complete" in pool.run("completion", "bash").output
    pool.on("GET /v1/models", MODELS)
    completing = {"_SLOTPOOL_COMPLETE": "bash_complete", "COMP_WORDS": "slotpool chat co", "COMP_CWORD": "2"}
    assert pool.run("chat", "co", env=completing).output == "plain,coder\n"
    assert pool.run("ev", env={**completing, "COMP_WORDS": "slotpool ev", "COMP_CWORD": "1"}).output == "plain,events\n"


def test_events_are_read_as_they_are_written():
    text = f": comment\n\n{event('load', {'a': 1}, 'e-3')}data: no json\n\n"
    assert [tuple(each) for each in events_of(text.split("\n"))] == [
        ("load", "e-3", {"a": 1}),
        ("message", "e-3", None),
    ]
