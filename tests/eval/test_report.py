"""Scores, table, JSON file and heat map, of whole runs and of runs that were stopped."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image
from matplotlib.colors import to_rgb
from rich.console import Console

from jax_mla_cp.eval.corpus import PasskeyPrompt
from jax_mla_cp.eval.heatmap import COLORS, draw_heatmap
from jax_mla_cp.eval.passkey import Passkey
from jax_mla_cp.eval.report import EvalReport

PROMPTS = [
    PasskeyPrompt(length, depth, Passkey("amber falcon", f"{length}{int(10 * depth)}"), [0] * length)
    for length in (300, 400)
    for depth in (0.0, 0.5, 1.0)
]


def report(answers: int, wrong: int | None = None) -> EvalReport:
    """`answers` in an order of their own, one of them wrong."""
    out = EvalReport(PROMPTS, ["--seed", "1"])
    for index in [3, 0, 5, 1, 4, 2][:answers]:
        out.add_answer(
            index, PROMPTS[index].length + 1, " 77" if index == wrong else f" {PROMPTS[index].passkey.key}.\n"
        )
    return out


def shown(report: EvalReport) -> str:
    console = Console(file=io.StringIO(), width=100)
    report.show(console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_scores() -> None:
    whole = report(6, wrong=4)
    assert whole.passkey_accuracy == pytest.approx(5 / 6)
    assert [(row.length, row.depth) for row in whole.rows] == [(p.length, p.depth) for p in PROMPTS]
    whole.set_perplexity([-1.0, -2.0, -6.0])
    assert whole.perplexity == pytest.approx(math.exp(3))
    assert report(0).passkey_accuracy is None and report(0).perplexity is None


@pytest.mark.parametrize("logprobs", [[-1.0, math.nan], [-math.inf, -1.0], [-800.0]])
def test_a_broken_models_perplexity_is_none_and_says_why(logprobs: list[float], tmp_path: Path) -> None:
    broken = report(6)
    broken.set_perplexity(logprobs)
    assert broken.perplexity is None and "mean log-probability" in str(broken.no_perplexity)
    broken.save(tmp_path / "out.json")
    assert "mean log-probability" in shown(broken)


def test_json(tmp_path: Path) -> None:
    whole = report(6, wrong=4)
    whole.set_perplexity([-2.0])
    whole.metadata = {"model": "m", "device": "cpu", "mesh": "tp=1,cp=2", "versions": {"jax": "1"}}
    whole.save(tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["passkey_accuracy"] == pytest.approx(5 / 6) and found["perplexity"] == pytest.approx(math.exp(2))
    assert {"device", "versions", "mesh", "model", "argv", "date"} <= found.keys()
    assert found["rows"][4] == {
        "length": 400,
        "depth": 0.5,
        "prompt_tokens": 401,
        "expected": "4005",
        "got": " 77",
        "correct": False,
    }


def test_table() -> None:
    text = shown(report(6, wrong=4))
    assert "3 of 3" in text and "2 of 3" in text
    assert "400 tokens, depth 0.50: expected 4005, got ' 77'" in text
    assert "passkey accuracy 0.8333 (5 of 6)" in text


def test_a_run_that_was_stopped_shows_what_it_has() -> None:
    part = report(2)
    part.stopped = "stopped with Ctrl-C"
    text = shown(part)
    assert "1 of 1" in text and "-" in text and "not complete: stopped with Ctrl-C" in text
    assert "passkey accuracy 1.0000 (2 of 2; 6 asked)" in text
    assert part.as_dict()["stopped"] and len(part.as_dict()["rows"]) == 2


def colors(path: Path) -> set[bool | None]:
    """The states whose color fills a good part of the picture: more than the legend's patch."""
    pixels = image.imread(path)[..., :3]
    return {s for s, c in COLORS.items() if (np.abs(pixels - to_rgb(c)).max(-1) < 0.02).mean() > 0.02}


def test_heat_map(tmp_path: Path) -> None:
    draw_heatmap(report(6), tmp_path / "right.png")
    draw_heatmap(report(6, wrong=4), tmp_path / "wrong.png")
    draw_heatmap(report(2), tmp_path / "part.png")
    assert colors(tmp_path / "right.png") == {True}
    assert colors(tmp_path / "wrong.png") == {True, False}
    assert colors(tmp_path / "part.png") == {True, None}
    draw_heatmap(report(6), tmp_path / "right.svg")
    assert "<svg" in (tmp_path / "right.svg").read_text()
    pixels = image.imread(tmp_path / "wrong.png")[..., :3]
    rows, columns = np.nonzero(np.abs(pixels - to_rgb(COLORS[False])).max(-1) < 0.02)
    assert columns.max() > pixels.shape[1] / 2, "the longer length is on the right"
    draw_heatmap(report(6, wrong=5), tmp_path / "deeper.png")
    deeper = np.nonzero(np.abs(image.imread(tmp_path / "deeper.png")[..., :3] - to_rgb(COLORS[False])).max(-1) < 0.02)[
        0
    ]
    assert np.median(deeper) > np.median(rows), "the text's end is at the bottom"
