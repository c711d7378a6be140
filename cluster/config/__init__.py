"""The configuration: one Pydantic schema, and how files and environment variables are laid over it."""

from cluster.config.load import ConfigError, load_config, read_yaml
from cluster.config.models import CacheType, FakeFaults, FlashAttention, Group, LlamaCppKwargs, ModelConfig, ServerEntry
from cluster.config.pool import MaxWait, PoolConfig

__all__ = [
    "CacheType",
    "ConfigError",
    "FakeFaults",
    "FlashAttention",
    "Group",
    "LlamaCppKwargs",
    "MaxWait",
    "ModelConfig",
    "PoolConfig",
    "ServerEntry",
    "load_config",
    "read_yaml",
]
