"""The configuration: one Pydantic schema, and how files and environment variables are laid over it."""

from cluster.config.backends import (
    CacheType,
    Ct2Kwargs,
    Ct2Model,
    FakeFaults,
    FakeModel,
    FlashAttention,
    LlamaCppKwargs,
    LlamaCppModel,
)
from cluster.config.exllama import ExllamaKwargs, ExllamaModel
from cluster.config.files import ConfigError, read_yaml
from cluster.config.keys import ANONYMOUS, ApiKey, Caller, find_key
from cluster.config.load import load_config, service_of
from cluster.config.models import Group, ModelConfig, ServerEntry
from cluster.config.pool import MaxWait, PoolConfig
from cluster.config.relayed import LaunchedModel, RemoteBudget, RemoteModel, ServerModel, SglangModel
from cluster.config.version import Configuration
from cluster.config.vllm import VllmModel

__all__ = [
    "ANONYMOUS",
    "ApiKey",
    "CacheType",
    "Caller",
    "ConfigError",
    "Configuration",
    "Ct2Kwargs",
    "Ct2Model",
    "ExllamaKwargs",
    "ExllamaModel",
    "FakeFaults",
    "FakeModel",
    "FlashAttention",
    "Group",
    "LaunchedModel",
    "LlamaCppKwargs",
    "LlamaCppModel",
    "MaxWait",
    "ModelConfig",
    "PoolConfig",
    "RemoteBudget",
    "RemoteModel",
    "ServerEntry",
    "ServerModel",
    "SglangModel",
    "VllmModel",
    "find_key",
    "load_config",
    "read_yaml",
    "service_of",
]
