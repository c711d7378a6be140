"""`pip install .` gives everything that the checkout has."""

from __future__ import annotations

import tomllib
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from app.cli import cli

ROOT = Path(__file__).parents[3]
PACKAGES = ("app", "cluster", "deployments")


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def files() -> list[Path]:
    found = (each for package in PACKAGES for each in (ROOT / package).rglob("*"))
    return [each for each in found if each.is_file() and "__pycache__" not in each.parts]


def test_every_folder_with_code_is_a_package():
    folders = {each.parent for each in files() if each.suffix == ".py"}
    assert [str(each) for each in sorted(folders) if not (each / "__init__.py").exists()] == []


def test_files_that_are_no_code_are_package_data():
    data = project()["tool"]["setuptools"].get("package-data", {})
    included = {
        file
        for package, patterns in data.items()
        for folder in (ROOT.glob("*") if package == "*" else [ROOT / package.replace(".", "/")])
        for pattern in patterns
        for file in folder.glob(pattern)
    }
    assert [str(each) for each in files() if each.suffix != ".py" and each not in included] == []


def test_the_version_stands_in_one_place():
    assert CliRunner().invoke(cli, ["--version"]).output == f"slotpool {project()['project']['version']}\n"
    (command,) = entry_points(group="console_scripts", name="slotpool")
    assert command.value == "app.cli:main"
