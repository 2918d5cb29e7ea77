"""The heat map of passkey retrieval: prompt lengths by depths."""

from __future__ import annotations

from pathlib import Path

from jax_mla_cp.eval.report import EvalReport

COLORS = {True: "#2a7fba", False: "#e07b39", None: "#d0d0d0"}


def draw_heatmap(report: EvalReport, path: Path) -> None:
    """Writes the heat map, in the format of the file's suffix. Needs matplotlib (the extra `eval`)."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    cells = report.cells()
    lengths, depths = report.axes()
    states = list(COLORS)
    values = [[states.index(cells[length, depth]) for length in lengths] for depth in depths]
    figure = Figure(figsize=(max(6.4, 1.5 + 0.9 * len(lengths)), 2.2 + 0.35 * len(depths)), layout="constrained")
    axes = figure.add_subplot()
    if cells:
        axes.pcolormesh(
            values,
            cmap=ListedColormap(list(COLORS.values())),
            vmin=0,
            vmax=len(states) - 1,
            edgecolors="white",
            linewidth=2,
        )
    axes.set_xticks([i + 0.5 for i in range(len(lengths))], [str(length) for length in lengths])
    axes.set_yticks([i + 0.5 for i in range(len(depths))], [f"{depth:.2f}" for depth in depths])
    axes.invert_yaxis()  # the text's start is at the top
    axes.tick_params(length=0)
    axes.set_xlabel("tokens of the prompt")
    axes.set_ylabel("depth of the fact")
    model, mesh = report.metadata["model"], report.metadata["mesh"]
    axes.set_title("\n".join([f"{model}{f', {mesh}' if mesh else ''}", *report.summary()]), fontsize="small")
    names = {True: "found", False: "not found", None: "not asked"}
    seen = [state for state in states if state in set(cells.values())]
    handles = [Patch(color=COLORS[state], label=names[state]) for state in seen]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize="small")
    figure.savefig(path, dpi=150)
