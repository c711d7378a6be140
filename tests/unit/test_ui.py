"""The status page's files: served as they are, to anybody, and only they; vendored are those of the manifest."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import httpx
import pytest

from app.routes import ui
from tests.unit.scripted import Scripted

PAGE = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
WITH_KEYS = {"models": {"m": {"backend": "fake"}}, "api_keys": ["sha256:" + "0" * 64]}
VENDOR = ui.FOLDER / "vendor"


async def get(path: str, args: dict | None = None, method: str = "GET", **headers: str) -> httpx.Response:
    async with Scripted(args=args).http() as http:
        return await http.request(method, path, headers=headers)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("", "text/html"),
        ("main.js", "text/javascript"),
        ("vendor/preact.mjs", "text/javascript"),
        ("style.css", "text/css"),
        ("icon.svg", "image/svg+xml"),
    ],
)
async def test_every_file_has_its_type_and_the_policy(name: str, kind: str):
    answer = await get(f"/ui/{name}")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith(kind)
    assert "script-src 'self';" in answer.headers["content-security-policy"]
    assert answer.headers["cache-control"] == "no-cache"
    again = await get(f"/ui/{name}", **{"if-none-match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("path", ["/ui/nothing", "/ui/../auth.py", "/ui/%2e%2e/auth.py", "/ui/vendor/manifest.json"])
async def test_nothing_else_is_served(path: str):
    assert (await get(path)).status_code in (400, 404)


async def test_the_page_is_found_without_a_key_and_nothing_else_is():
    assert (await get("/ui", WITH_KEYS)).headers["location"] == "ui/"
    assert (await get("/ui/", WITH_KEYS)).status_code == 200
    assert (await get("/ui/", WITH_KEYS, "HEAD")).status_code == 200
    assert (await get("/ui/", WITH_KEYS, "POST")).status_code == 401
    assert (await get("/uix", WITH_KEYS)).status_code == 401
    assert (await get("/v1/admin/events", WITH_KEYS)).status_code == 401


async def test_a_browser_is_led_to_the_page_and_others_are_not():
    led = await get("/", None, **PAGE)
    assert (led.status_code, led.headers["location"]) == (307, "ui/")
    assert (await get("/")).status_code == 405
    assert (await get("/", method="HEAD")).status_code == 200


def test_no_file_has_scripts_or_styles_in_its_markup():
    """The policy would not run them; a page that needs no other origin works without the internet."""
    page = (ui.FOLDER / "index.html").read_text()
    assert "<style" not in page
    assert page.count("<script") == page.count('<script type="module" src=')
    for path in ui.FOLDER.iterdir():
        if path.is_file():
            text = path.read_text().replace("http://www.w3.org/2000/svg", "")
            assert "//cdn" not in text, path
            assert "https://" not in text, path


def test_vendored_files_are_those_of_the_manifest():
    manifest = json.loads((VENDOR / "manifest.json").read_text())
    listed = {}
    for package in manifest["packages"]:
        assert any(file["source"].startswith("LICENSE") for file in package["files"]), package["name"]
        listed |= {file["name"]: file["sha256"] for file in package["files"]}
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in VENDOR.iterdir()}
    del found["manifest.json"]
    assert found == listed


def test_the_package_carries_every_file():
    """What `package-data` of pyproject.toml matches is all there is."""
    root = ui.FOLDER.parent
    matched = {path for pattern in ("ui/*", "ui/vendor/*") for path in root.glob(pattern) if path.is_file()}
    assert matched == {path for path in Path(ui.FOLDER).rglob("*") if path.is_file()}
