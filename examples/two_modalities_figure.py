"""The figure of two_modalities.py: alignment and loss over the grid, and the best of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import sam_common as common
from alignment import Run, Scores, Setting

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"SGD": "0.35", "Adam": "tab:orange", "SAM": "tab:red", "Monge SAM": "tab:blue"}
TWO = ("SAM", "Monge SAM")


def band(ax: plt.Axes, values: Sequence[float], colour: str, label: str) -> None:
    """Draw an interval over the whole width."""
    mean, half = common.interval(values)
    ax.axhline(mean, color=colour, lw=1.2, label=label)
    ax.axhspan(mean - half, mean + half, color=colour, alpha=0.15, lw=0)


def against_radius(ax: plt.Axes, runs: dict[Setting, list[Run]], lr: float, what: str) -> None:
    """Draw SAM and Monge SAM over rho at one learning rate, with SGD as a band."""
    band(ax, [getattr(r, what) for r in runs[Setting("SGD", lr)]], COLOURS["SGD"], "SGD")
    for method, shift in zip(TWO, (0.96, 1.04), strict=True):
        own = [s for s in runs if (s.method, s.lr) == (method, lr)]
        points = np.array([common.interval([getattr(r, what) for r in runs[s]]) for s in own])
        ax.errorbar([s.rho * shift for s in own], points[:, 0], yerr=points[:, 1], fmt="o-",
                    color=COLOURS[method], ms=4, capsize=2, lw=1.2, label=method)  # fmt: skip
    rhos = [s.rho for s in runs if (s.method, s.lr) == ("SAM", lr)]
    ax.set_xscale("log")
    ax.set_xticks(rhos, [f"{v:g}" for v in rhos])
    ax.minorticks_off()
    ax.set(xlabel="ρ", title=f"learning rate {lr:g}")


def figure(
    file: Path,
    runs: dict[Setting, list[Run]],
    best: dict[str, Setting],
    scores: dict[str, list[Scores]],
    chance: float,
    size: int,
) -> None:
    """Draw the grid's alignment (above) and loss (below), the test (right), true lengths."""
    rates = sorted({s.lr for s in runs if s.method == "SAM"})
    fig, axes = plt.subplots(2, len(rates) + 1, figsize=(4 * (len(rates) + 1), 7.2))
    for column, lr in enumerate(rates):
        for row, what in enumerate(("alignment", "loss")):
            against_radius(axes[row, column], runs, lr, what)
        axes[1, column].axhline(math.log(size), color="black", ls=":", lw=1, label="chance")
    for row, name in enumerate(("alignment, validation pairs", "train loss at the end")):
        shared = axes[row, :-1]
        limits = np.array([ax.get_ylim() for ax in shared])
        for ax in shared:
            ax.set_ylim(limits[:, 0].min(), limits[:, 1].max())
        shared[0].set_ylabel(name)
    axes[0, 0].legend(fontsize=9, frameon=False)
    axes[1, 0].legend(fontsize=9, frameon=False)

    last = axes[0, -1]
    for x, (name, own) in enumerate(scores.items()):
        mean, half = common.interval([s.alignment for s in own])
        colour = COLOURS.get(name, "black")
        last.errorbar(x, mean, yerr=half, fmt="o", color=colour, capsize=4, ms=6)
        last.plot([x + 0.18] * len(own), [s.alignment for s in own], "_", color=colour, ms=8)
    last.axhline(chance, color="black", ls=":", lw=1)
    last.annotate("chance", (-0.3, chance), xytext=(0, 3), textcoords="offset points", fontsize=9)
    labels = [f"{best[n]}" if n in best else n for n in scores]
    last.set_xticks(range(len(scores)), labels, fontsize=8)
    last.set(ylim=(0, None), title="alignment, test pairs", xlim=(-0.5, len(scores) - 0.3))

    lengths = axes[1, -1]
    for method in TWO:
        for lr, mark in zip(rates, "os^", strict=False):
            own = [s for s in runs if (s.method, s.lr) == (method, lr)]
            lengths.plot([np.nanmean([r.radius for r in runs[s]]) for s in own],
                         [np.mean([r.alignment for r in runs[s]]) for s in own],
                         mark + "-", color=COLOURS[method], ms=4, lw=0.8, alpha=0.8,
                         label=f"{method}, lr {lr:g}")  # fmt: skip
    lengths.set_xscale("log")
    lengths.set(xlabel="mean length of δ", title="alignment, validation pairs")
    lengths.legend(fontsize=7, frameon=False)
    fig.tight_layout()
    fig.savefig(file, dpi=110)
    plt.close(fig)
