"""The scenes of the race with llama-server: the same seed means the same requests, and what counts as an answer."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from tests.bench import race_scenes
from tests.bench.race_scenes import OFTEN, RARE, SCENES, Arrival, Result

#: A script that plays the same scenes against any server, kept elsewhere; its own path, or where it lies here.
OTHER = Path(os.environ.get("SLOTPOOL_RACE", Path(__file__).parents[3] / "shared" / "race.py"))


@pytest.mark.skipif(not OTHER.exists(), reason="the other script that plays these scenes is not here")
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("name", SCENES)
def test_the_requests_are_those_of_the_other_script(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("other_race", OTHER)
    assert spec is not None
    assert spec.loader is not None
    other = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "other_race", other)
    spec.loader.exec_module(other)
    scene = SCENES[name]
    options = argparse.Namespace(
        seed=seed, n=40, rate=scene.rate, share=scene.share, model_a=OFTEN, model_b=RARE, tokens=48
    )
    theirs = [(each.at_s, each.model, each.prompt) for each in other.plan(options)]
    ours = race_scenes.poisson(scene, seed, 40, 48)
    assert [(each.at_s, each.model, each.body["prompt"]) for each in ours] == theirs
    assert all(each.body["max_tokens"] == 48 and each.body["model"] == each.model for each in ours)


def test_a_seed_is_a_scene() -> None:
    first, second = (race_scenes.poisson(SCENES["rare"], 1, 400, 8) for _ in range(2))
    assert first == second != race_scenes.poisson(SCENES["rare"], 2, 400, 8)
    assert 180 < first[-1].at_s < 220
    assert 0.9 < sum(each.model == OFTEN for each in first) / 400 < 0.96
    flood = race_scenes.flood(1, 60.0, 1.0)
    assert flood == race_scenes.flood(1, 60.0, 1.0)
    assert sum(each.model == RARE for each in flood) == 6


ANSWERS = {
    "whole": b'data: {"choices": [{"text": "once"}]}\n\ndata: [DONE]\n\n',
    "chat": b'data: {"choices": [{"delta": {"content": "once"}}]}\n\ndata: [DONE]\n\n',
    "silent": b'data: {"choices": [{"delta": {"role": "assistant"}}]}\n\ndata: [DONE]\n\n',
    "cut": b'data: {"choices": [{"text": "once"}]}\n\n',
    "error": b'data: {"choices": [{"text": "once"}]}\n\ndata: {"error": {"message": "no"}}\n\ndata: [DONE]\n\n',
}


async def test_only_whole_answers_count() -> None:
    async def answer(request: web.Request) -> web.Response:
        model = (await request.json())["model"]
        return web.Response(body=ANSWERS[model]) if model in ANSWERS else web.Response(status=503, text="away")

    app = web.Application()
    app.router.add_post("/v1/completions", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    arrivals = [Arrival(0.0, model, {"model": model}) for model in (*ANSWERS, "refused")]
    async with aiohttp.ClientSession() as session:
        results = await race_scenes.play(session, f"http://127.0.0.1:{port}", arrivals)
        (away,) = await race_scenes.play(session, "http://127.0.0.1:9", arrivals[:1])
    await runner.cleanup()
    seen = {each.model: each for each in results}
    assert [model for model, each in seen.items() if each.is_whole] == ["whole", "chat"]
    assert [model for model, each in seen.items() if each.cut] == ["cut"]
    assert [model for model, each in seen.items() if each.error] == ["error", "refused"]
    assert away.error is not None
    told = race_scenes.figures(results)
    assert (told["failed"], told["cut"]) == (2, 1)


def test_the_figures_of_several_seeds() -> None:
    def run(*ttfts: float) -> dict[str, object]:
        rows = [Result(OFTEN, 1.0, ttft, 2 * ttft, None, False) for ttft in ttfts]
        return race_scenes.figures([*rows, Result(RARE, 1.0, None, 9.0, "no", False)])

    told = race_scenes.together([run(1.0), run(2.0), run(4.0, 6.0)])
    assert (told["e2e_mean_s"], told["ttft_p95_s"], told["failed"], told["cut"]) == (4.0, 2.0, 3, 0)
    assert (told["makespan_s"], told["rare_ttft_p95_s"]) == (10.0, None)
    assert len(told["runs"]) == 3
