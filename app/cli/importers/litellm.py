"""LiteLLM's proxy configuration: names with the providers behind them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from app.cli.found import free_id
from app.cli.importers.draft import Draft, Key, Source, hashed, mapping, variable_for
from app.loopback import is_loopback
from cluster.config import ConfigError

VARIABLE = "os.environ/"
#: Providers that run on machines of one's own: their server's type, and the address where none is given.
LOCAL = {
    "ollama": ("ollama", "http://127.0.0.1:11434"),
    "ollama_chat": ("ollama", "http://127.0.0.1:11434"),
    "lm_studio": ("lmstudio", "http://127.0.0.1:1234"),
    "hosted_vllm": ("vllm", "http://127.0.0.1:8000"),
    "vllm": ("vllm", "http://127.0.0.1:8000"),
    "llamafile": ("llama_server", "http://127.0.0.1:8080"),
}
#: Providers whose API is OpenAI's, and where it is.
REMOTE = {
    "openai": "https://api.openai.com/v1",
    "groq": "https://api.groq.com/openai/v1",
    "mistral": "https://api.mistral.ai/v1",
    "deepseek": "https://api.deepseek.com/v1",
    "openrouter": "https://openrouter.ai/api/v1",
    "together_ai": "https://api.together.xyz/v1",
    "fireworks_ai": "https://api.fireworks.ai/inference/v1",
    "xai": "https://api.x.ai/v1",
}
#: What a server that batches may be asked for at a time, where nobody says.
BATCHING, BATCH = frozenset(("vllm", "llama_server")), 16
TOP = frozenset(("model_list", "litellm_settings", "router_settings", "general_settings"))
PARAMS = frozenset(("model", "api_base", "api_key", "timeout", "max_retries", "max_parallel_requests"))
REASONS = {
    "rpm": "not carried over: limits are per key (requests_per_minute)",
    "tpm": "not carried over: limits are per key (budget)",
    "weight": "not carried over: give the models of one alias a weight",
    "temperature": "not carried over: clients send it with each request",
    "max_tokens": "not carried over: clients send it with each request",
    "stream_timeout": "not carried over: `timeout` holds for the silence between two parts",
    "environment_variables": "not carried over: set them where the pool is started",
    "drop_params": "not needed: what steers a hosted service is left out and named, always",
    "set_verbose": "not carried over: service.log_level of a settings file",
    "json_logs": "not carried over: request_log writes a line of JSON for each request",
    "database_url": "not carried over: `store` is where the pool keeps what must last",
    "routing_strategy": "not needed: the ledger says who goes where",
    "cache": "not carried over: answers are not cached, their prompts are",
    "cache_params": "not carried over: answers are not cached, their prompts are",
    "callbacks": "not carried over: GET /metrics and GET /v1/admin/events",
    "success_callback": "not carried over: GET /metrics and GET /v1/admin/events",
    "fallbacks": "not carried over: a paid API is used only by requests that name it, a server's model by its name",
    "context_window_fallbacks": "not carried over: a prompt that is too long is refused with the limit",
}


def convert(source: Source) -> Draft:
    """The pool that offers what this proxy offers. Raises `ConfigError` where it is none."""
    data = source.mapping()
    listed = data.get("model_list")
    if not isinstance(listed, list):
        raise ConfigError(f"{source.path.name}: there is no model_list in it")
    draft = Draft(source)
    draft.drop((), data, REASONS, TOP)
    router, settings = mapping(data.get("router_settings")), mapping(data.get("litellm_settings"))
    retries = settings.get("num_retries", router.get("num_retries"))
    for index, entry in enumerate(listed):
        _entry(draft, ("model_list", index), mapping(entry), retries)
    _settings(draft, settings)
    _router(draft, router)
    _general(draft, mapping(data.get("general_settings")))
    return draft


def _entry(draft: Draft, where: Key, entry: Mapping[str, Any], retries: Any) -> None:
    name, params = str(entry.get("model_name") or ""), mapping(entry.get("litellm_params"))
    place: Key = (*where, "litellm_params")
    draft.drop(where, entry, REASONS, frozenset(("model_name", "litellm_params", "model_info")))
    draft.drop(place, params, REASONS, PARAMS)
    provider, _, model = str(params.get("model") or "").partition("/")
    if not model:
        provider, model = "openai", provider
    base = _plain(params.get("api_base"))
    if base is None and "api_base" in params:
        draft.note((*place, "api_base"), "not carried over: an address from the environment must be written out")
        return
    if "*" in name or "*" in model:
        draft.note((*where, "model_name"), "not carried over: every model of a server is offered under its own name")
        if provider not in LOCAL and not (base and _is_near(base)):
            return
    if provider in LOCAL or (provider == "openai" and base and _is_near(base)):
        _local(draft, where, name, provider, model, base, params)
    elif provider in REMOTE:
        _remote(draft, where, name, base or REMOTE[provider], model, params, entry, retries)
    else:
        draft.note((*place, "model"), f"not carried over: {provider} has an API of its own; Slotpool speaks OpenAI's")


def _local(
    draft: Draft, where: Key, name: str, provider: str, model: str, base: str | None, params: Mapping[str, Any]
) -> None:
    kind, usual = LOCAL.get(provider, (None, ""))
    server: dict[str, Any] = {"url": (base or usual).rstrip("/").removesuffix("/v1")}
    limit = params.get("max_parallel_requests")
    server["max_concurrent"] = limit if isinstance(limit, int) else BATCH if kind in BATCHING else 1
    if kind is not None:
        server["server_type"] = kind
    if (variable := _key_variable(draft, where, name, params)) is not None:
        server["api_key_env"] = variable
    draft.add_server(server)
    if name != model and "*" not in name:
        text = f"not carried over: a server's model has the name that the server gives it: {model}"
        draft.note((*where, "model_name"), text)
    if limit is None and kind is None:
        draft.note((*where, "litellm_params", "api_base"), "taken to run one request at a time: raise max_concurrent")


def _remote(
    draft: Draft,
    where: Key,
    name: str,
    base: str,
    model: str,
    params: Mapping[str, Any],
    entry: Mapping[str, Any],
    retries: Any,
) -> None:
    keys: dict[str, Any] = {"backend": "openai_compatible", "remote_base_url": base}
    if (variable := _key_variable(draft, where, name, params)) is not None:
        keys["remote_api_key_env"] = variable
    keys["remote_model"] = model
    if isinstance(params.get("timeout"), int | float):
        keys["remote_timeout_s"] = params["timeout"]
    retries = params.get("max_retries", retries)
    if isinstance(retries, int) and retries:
        keys["remote_max_retries"] = min(10, retries)
    info = mapping(entry.get("model_info"))
    if info.get("mode") == "embedding":
        keys["type"] = "embedding"
    costs = {"input": info.get("input_cost_per_token"), "output": info.get("output_cost_per_token")}
    price = {side: round(cost * 1e6, 6) for side, cost in costs.items() if isinstance(cost, int | float)}
    if price:
        keys["price"] = price
    taken = frozenset(("mode", "input_cost_per_token", "output_cost_per_token"))
    draft.drop((*where, "model_info"), info, REASONS, taken)
    own = free_id(name, draft.models)
    draft.models[own] = keys
    draft.note((*where, "model_name"), "a paid API: only requests with allow_remote: true reach it")
    if own != name:
        draft.note((*where, "model_name"), f"it is called {own}: paid APIs do not share the requests of one name")


def _key_variable(draft: Draft, where: Key, name: str, params: Mapping[str, Any]) -> str | None:
    """The variable that holds the key. One that stands in the file is not repeated anywhere."""
    key = params.get("api_key")
    if not isinstance(key, str) or key.lower() in ("", "none", "dummy", "fake-key", "anything"):
        return None
    if key.startswith(VARIABLE):
        return key.removeprefix(VARIABLE)
    variable = variable_for(name)
    text = f"a key in clear is not carried over: put it into the environment variable {variable}"
    draft.note((*where, "litellm_params", "api_key"), text)
    return variable


def _settings(draft: Draft, settings: Mapping[str, Any]) -> None:
    where: Key = ("litellm_settings",)
    if isinstance(settings.get("request_timeout"), int | float):
        draft.pool["request_timeout_seconds"] = settings["request_timeout"]
    draft.drop(where, settings, REASONS, frozenset(("request_timeout", "num_retries")))


def _router(draft: Draft, router: Mapping[str, Any]) -> None:
    where: Key = ("router_settings",)
    for alias, target in mapping(router.get("model_group_alias")).items():
        name = target.get("model") if isinstance(target, dict) else target
        if name in draft.models:
            draft.models[name].setdefault("aliases", []).append(str(alias))
        else:
            draft.note(
                (*where, "model_group_alias", str(alias)), "not carried over: only models of the pool have aliases"
            )
    if isinstance(router.get("timeout"), int | float):
        draft.pool.setdefault("request_timeout_seconds", router["timeout"])
    draft.drop(where, router, REASONS, frozenset(("model_group_alias", "num_retries", "timeout")))


def _general(draft: Draft, general: Mapping[str, Any]) -> None:
    key = general.get("master_key")
    if isinstance(key, str) and key:
        variable = key.removeprefix(VARIABLE)
        shown = f"env:{variable}" if key.startswith(VARIABLE) else hashed(key)
        draft.pool["admin_keys"] = [{"name": "master", "key": shown}]
        draft.note(("general_settings", "master_key"), "it is the operators' key here; clients' keys are api_keys")
    draft.drop(("general_settings",), general, REASONS, frozenset(("master_key",)))


def _is_near(base: str) -> bool:
    """Whether an address is one of our own machines, where nothing is paid by the token."""
    host = urlsplit(base).hostname or ""
    private = host.startswith(("10.", "192.168.", "172.")) or host in ("0.0.0.0", "host.docker.internal")
    return is_loopback(host) or private or "." not in host or host.endswith((".local", ".lan", ".internal"))


def _plain(value: Any) -> str | None:
    return value if isinstance(value, str) and not value.startswith(VARIABLE) else None
