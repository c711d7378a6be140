"""The pages and schemas that are made from the code are up to date, and every key of the configuration is explained."""

from __future__ import annotations

from cluster.config.meanings import meanings, parts
from cluster.config.models import ModelConfig
from cluster.config.pool import PoolConfig
from cluster.generated import generated
from tests.unit.pages import DOCS


def test_what_is_made_from_the_code_is_up_to_date():
    for path, text in generated(DOCS).items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: make docs"


def test_every_key_says_what_it_means():
    silent = set()
    for kind in (PoolConfig, *ModelConfig.backends.values()):
        for part in parts(kind):
            silent |= {f"{part.__name__}.{key}" for key in set(part.model_fields) - set(meanings(part))}
    assert silent == set(), "write a #: comment above it"
