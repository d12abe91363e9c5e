"""Tables and plots of what sampling.py and passes.py measured.

    python benchmarks/sampling_report.py

Needs matplotlib. Prints the tables of docs/sampling.md and writes its pictures.
"""

import argparse
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"
SMALL = "small model"
SHOWN = ("flow_pec", "euler", "heun", "res_multistep", "dpmpp_2m", "sa_solver")
Cells = dict[str, float]


def mean(errors: Iterable[float]) -> float:
    """Geometric; what is exact counts as 1e-9."""
    return math.exp(statistics.fmean(math.log(max(error, 1e-9)) for error in errors))


def cells(
    errors: dict[str, Any], tasks: Sequence[str], schedules: Sequence[str], way: str
) -> Cells:
    """{evaluations: mean error}, where every task and schedule has a figure."""
    found = [errors[t][s][way] for t in tasks for s in schedules if way in errors[t].get(s, {})]
    if len(found) < len(tasks) * len(schedules):
        return {}
    common = set.intersection(*(set(cell) for cell in found))
    return {n: mean(cell[n] for cell in found) for n in sorted(common, key=int)}


def table(title: str, rows: dict[str, Cells]) -> None:
    """A Markdown table of what has figures, the best of a column in bold."""
    rows = {name: cell for name, cell in rows.items() if cell}
    columns = sorted({n for cell in rows.values() for n in cell}, key=int)
    best = {n: min(cell[n] for cell in rows.values() if n in cell) for n in columns}
    print(f"\n| {title} | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for name, cell in rows.items():
        texts = [f"{cell[n]:.4f}" if n in cell else "" for n in columns]
        texts = [
            f"**{t}**" if t and cell[n] == best[n] else t
            for t, n in zip(texts, columns, strict=True)
        ]
        print(f"| {name} | " + " | ".join(texts) + " |")


def plot_errors(axes: Any, title: str, rows: dict[str, Cells]) -> None:
    """A colour for each sampler, dashes for ComfyUI's; flow_pec in black."""
    names = dict.fromkeys(name.removeprefix("ComfyUI ") for name in rows)
    colours = dict(zip(names, pyplot.get_cmap("tab20").colors[::2] * 2, strict=False))
    for name, cell in rows.items():
        theirs = name.startswith("ComfyUI")
        axes.loglog(
            [int(count) for count in cell], list(cell.values()), "--" if theirs else "-",
            color="black" if name == "flow_pec" else colours[name.removeprefix("ComfyUI ")],
            linewidth=2 if name == "flow_pec" or theirs else 1, marker="o", markersize=3,
            zorder=1 if theirs else 2, label=name,
        )  # fmt: skip
    axes.set_title(title)
    axes.set_xlabel("model evaluations")
    axes.set_ylabel("relative error of the final latent")
    axes.set_xticks([8, 13, 16, 26, 52], ["8", "13", "16", "26", "52"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def errors_report() -> None:
    errors = json.loads((RESULTS / "sampling.json").read_text())["errors"]
    toys = [task for task in errors if task != SMALL]
    schedules = list(errors[SMALL])
    full = [s for s in schedules if len(errors[SMALL][s]) > len(SHOWN)]
    ways = list(errors[SMALL][full[0]])
    table("small model, beta 0.6", {w: cells(errors, [SMALL], full[:1], w) for w in ways})
    table(f"small model, mean of {len(full)} schedules",
          {w: cells(errors, [SMALL], full, w) for w in ways})  # fmt: skip
    table(f"{len(toys)} known flows, mean of {len(full)} schedules",
          {w: cells(errors, toys, full, w) for w in ways})  # fmt: skip
    own = "flow_pec"
    table(f"small model, {own}", {s: cells(errors, [SMALL], [s], own) for s in schedules})
    table(f"known flows, {own}", {s: cells(errors, toys, [s], own) for s in errors[toys[0]]})
    shown = [way for way in ways if way.removeprefix("ComfyUI ") in SHOWN]
    figure, both = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    for axes, title, tasks in zip(both, (SMALL, "known flows"), ([SMALL], toys), strict=True):
        rows = {w: cells(errors, tasks, full[:1], w) for w in shown}
        plot_errors(axes, f"{title}, beta 0.6", rows)
    both[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(DOCS / "sampling-error.png", dpi=90)


def passes_report() -> None:
    found = json.loads((RESULTS / "passes.json").read_text())
    print("\n| | passes | background | emoji | style | error | distance |\n|" + "---|" * 7)
    for way, row in found.items():
        shares = " | ".join(f"{row[k]:.1%}" for k in ("background", "emoji", "style"))
        print(f"| {way} | {row['passes']:.1f} | {shares} | {row['error']:.4f} "
              f"| {row['distance']:.2f} |")  # fmt: skip
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    groups = {"cache": "s", "guidance": "^", "": "o"}
    for way, row in found.items():
        marker = next(mark for word, mark in groups.items() if word in way)
        axes.scatter(row["passes"], row["error"], marker=marker)
        axes.annotate(way, (row["passes"], row["error"]), fontsize=6)
    axes.set_yscale("log")
    axes.set_xlabel("passes through the transformer per picture")
    axes.set_ylabel("relative error of the final latent")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(DOCS / "passes.png", dpi=90)


if __name__ == "__main__":
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    errors_report()
    passes_report()
