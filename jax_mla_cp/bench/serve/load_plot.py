"""The plot of a load test: latency distributions, and requests in flight over time."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jax_mla_cp.bench.serve.load_report import LoadReport

_COLOR, _BOUND, _FAILED = "#2a7fba", "#e07b39", "#c0392b"


def draw_load(report: LoadReport, path: Path) -> None:
    """Writes the plot, in the format of the file's suffix. Needs matplotlib (the extra `bench`)."""
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 6.4), layout="constrained")
    grid: list[list[Axes]] = figure.subplots(2, 2).tolist()
    (first, gaps), (when, load) = grid
    latencies = report.latencies()
    for axes, name, goal in ((first, "TTFT", "ttft"), (gaps, "ITL", "itl")):
        values = np.sort(np.asarray(latencies[name], np.float64)) * 1e3
        axes.step(values, np.arange(1, len(values) + 1) / max(len(values), 1), where="post", color=_COLOR)
        if goal in report.goals:
            axes.axvline(report.goals[goal] * 1e3, color=_BOUND, linestyle="--", label="bound")
            axes.legend(fontsize="small")
        axes.set_xlabel(f"{name}, ms")
        axes.set_ylabel("share of requests" if name == "TTFT" else "share of gaps")
        axes.set_ylim(0, 1.02)
    succeeded = report.succeeded
    when.scatter([r.planned.at for r in succeeded], [r.ttft * 1e3 for r in succeeded], s=8, color=_COLOR)
    for failed in (r for r in report.results if r.error is not None):
        when.axvline(failed.planned.at, color=_FAILED, linewidth=0.5)
    when.set_xlabel("planned time of sending, s (red: failed)")
    when.set_ylabel("TTFT, ms")
    when.set_ylim(bottom=0)
    levels = report.in_flight()
    load.step([moment for moment, _ in levels], [level for _, level in levels], where="post", color=_COLOR)
    load.set_xlabel("s")
    load.set_ylabel("requests at the server")
    load.set_ylim(bottom=0)
    row = next(row for row in report.rows() if row["table"] == "throughput")
    rate = "" if row["out_tokens_s"] is None else f", {row['out_tokens_s']:.4g} output tokens/s"
    figure.suptitle(
        f"{report.metadata['model']}: {row['succeeded']} of {row['requests']} requests{rate}", fontsize="small"
    )
    figure.savefig(path, dpi=150)
