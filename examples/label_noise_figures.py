"""Intervals over seeds, and the two figures of the comparison under label noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import label_noise_runs as lab
import matplotlib
import numpy as np
import scipy.stats
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LEAST = "least l1 norm"
# Okabe and Ito's colours: told apart also without red or green.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#555555"


def median_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Return the median and the order statistics that hold it at least so often.

    The interval of the sign test, exact for any continuous distribution; without enough values
    for the level it is all of the line.
    """
    x = np.sort(np.asarray(values, dtype=float))
    n = len(x)
    k = int(scipy.stats.binom.ppf((1 - level) / 2, n, 0.5))  # the k-th from both ends
    if k == 0 or 2 * scipy.stats.binom.cdf(k - 1, n, 0.5) > 1 - level:
        k -= 1
    if k < 1:
        return float(np.median(x)), -math.inf, math.inf
    return float(np.median(x)), float(x[k - 1]), float(x[n - k])


def share_interval(count: int, of: int) -> tuple[float, float]:
    """Return the interval of Clopper and Pearson for a share."""
    found = scipy.stats.binomtest(count, of).proportion_ci(0.95)
    return float(found.low), float(found.high)


def chosen(rows: list[lab.Record], **wanted: Any) -> list[lab.Record]:
    """Return the records that have these values, by seed."""
    found = [r for r in rows if all(r[k] == v for k, v in wanted.items())]
    return sorted(found, key=lambda r: r["seed"])


def column(rows: list[lab.Record], name: str) -> list[float]:
    return [r[name] for r in rows]


def flag(rows: list[lab.Record]) -> str:
    """Say how many of the runs have not converged."""
    missing = sum(not r["converged"] for r in rows)
    return f" †{missing}" if missing else ""


def middle_settings(part: lab.Sparse) -> tuple[str, str]:
    """Return the names of the SGD and the Adam that are compared: of the middle rate."""
    plain = [s for s in part.settings if s.power == 0]
    adams = [s for s in part.settings if s.power == 0.5]
    rate = sorted({s.lr for s in adams})[len({s.lr for s in adams}) // 2]
    return plain[len(plain) // 2].name, next(s.name for s in adams if s.lr == rate)


def tidy(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)


def draw_line(ax: Axes, part: lab.Sparse, result: lab.Record, name: str, colour: str, *,
              style: str = "-", label: str, band: bool = True) -> None:  # fmt: skip
    """Draw medians over n with their intervals; hollow where a run has not converged."""
    sets = [chosen(result["runs"], n=n, name=name) for n in part.sizes]
    found = np.array([median_interval(column(runs, "test loss")) for runs in sets])
    if band and np.isfinite(found).all():
        ax.fill_between(part.sizes, found[:, 1], found[:, 2], color=colour, alpha=0.18, lw=0)
    ax.plot(part.sizes, found[:, 0], style, color=colour, lw=1.6, label=label)
    for n, value, runs in zip(part.sizes, found[:, 0], sets, strict=True):
        face = "white" if flag(runs) else colour
        ax.plot(n, value, "o", ms=4.5, mec=colour, mfc=face)


def sparse_figure(
    file: Path, small: lab.Sparse, large: lab.Sparse, result: lab.Record, big: lab.Record
) -> None:
    """Draw test loss and recovery over the number of examples."""
    fig, axes = plt.subplots(2, 2, figsize=(9, 7))
    styles = ["--", "-", ":"]
    plain, other = middle_settings(small)
    sgds = [s for s in small.settings if s.power == 0]
    first = next(s for s in small.settings if s.power == 0.5)
    ratio = (1 - first.beta2) / first.lr**2
    adams = [s for s in small.settings if s.power == 0.5
             and math.isclose((1 - s.beta2) / s.lr**2, ratio, rel_tol=1e-6)]  # fmt: skip
    least = [np.median(column(chosen(result["least"], n=n), "test loss")) for n in small.sizes]
    a, b, c, e = axes.flat
    for ax in (a, c):
        ax.plot(small.sizes, np.maximum(least, 1e-4), color="black", lw=1.2, ls="-.", label=LEAST)
        ax.axhline(lab.RECOVERED * small.kappa / 2, color="0.5", lw=0.8)
    pairs = ((sgds, BLUE, "SGD"), (adams, ORANGE, "Adam"))
    for group, colour, kind in pairs:
        order = styles if len(group) > 1 else ["-"]
        for s, style in zip(group, order, strict=False):
            draw_line(a, small, result, s.name, colour, style=style, label=f"{kind}, lr {s.lr:g}",
                      band=s.name in (plain, other))  # fmt: skip
    a.set_title(f"a   d = {small.d}, κ = {small.kappa}: Adam with 1 − β₂ = {ratio:.3g} lr²",
                fontsize=10, loc="left")  # fmt: skip
    for name, colour, label in ((plain, BLUE, plain.split(", 1 -")[0]),
                                (other, ORANGE, other.split(", 1 -")[0])):  # fmt: skip
        counts = [sum(r["recovered"] for r in chosen(result["runs"], n=n, name=name))
                  for n in small.sizes]  # fmt: skip
        limits = np.array([share_interval(k, small.seeds) for k in counts])
        b.fill_between(small.sizes, limits[:, 0], limits[:, 1], color=colour, alpha=0.18, lw=0)
        b.plot(small.sizes, np.array(counts) / small.seeds, "o-", color=colour, ms=4.5, lw=1.6,
               label=label)  # fmt: skip
    share = [np.mean(column(chosen(result["least"], n=n), "recovered")) for n in small.sizes]
    b.plot(small.sizes, share, color="black", lw=1.2, ls="-.", label=LEAST)
    b.set_title(f"b   d = {small.d}: recovered of {small.seeds} seeds", fontsize=10, loc="left")
    b.set(ylabel="share of seeds", ylim=(-0.03, 1.03))
    colours = {0.0: BLUE, 0.25: GREEN, 0.5: ORANGE, 0.75: PURPLE}
    names = {0.0: plain, 0.5: other}
    for s in small.settings:
        names.setdefault(s.power, s.name)
    for power in sorted(names):
        label = {0.0: "λ = 0 (SGD)", 0.5: "λ = 0.5 (Adam)"}.get(power, f"λ = {power:g}")
        draw_line(c, small, result, names[power], colours[power], label=label)
    c.set_title(f"c   d = {small.d}: AdamE-λ", fontsize=10, loc="left")
    for s, colour, style, shape in zip(large.settings, (BLUE, ORANGE, PURPLE), ("-", "-", "--"),
                                       "os^", strict=False):  # fmt: skip
        runs = [chosen(big["runs"], n=n, name=s.name) for n in large.sizes]
        e.plot(large.sizes, [np.median(column(r, "test loss")) for r in runs], style,
               color=colour, lw=1.4, label=s.name)  # fmt: skip
        for n, found in zip(large.sizes, runs, strict=True):
            for r in found:
                e.plot(n, r["test loss"], shape, ms=5, mec=colour,
                       mfc=colour if r["converged"] else "white")  # fmt: skip
    least = [np.median(column(chosen(big["least"], n=n), "test loss")) for n in large.sizes]
    e.plot(large.sizes, np.maximum(least, 1e-4), color="black", lw=1.2, ls="-.", label=LEAST)
    e.axhline(lab.RECOVERED * large.kappa / 2, color="0.5", lw=0.8)
    e.set_title(f"d   d = {large.d:,}, κ = {large.kappa}: {large.seeds} seeds, each a mark",
                fontsize=10, loc="left")  # fmt: skip
    for ax in (a, c, e):
        ax.set(yscale="log", ylabel="test loss, ½‖w − w*‖²")
        found = result if ax is not e else big
        ax.set_ylim(np.nanmin(column(found["runs"], "test loss")) / 2, None)
    for ax in axes.flat:
        tidy(ax)
        ax.set_xlabel("training examples n")
        ax.legend(fontsize=7.5, frameon=True, framealpha=0.9)
    e.set_xscale("log")
    e.set_xticks(large.sizes, [str(n) if n != 420 else "" for n in large.sizes])
    e.minorticks_off()
    fig.tight_layout()
    fig.savefig(file, dpi=130)
    plt.close(fig)


def matrix_figure(file: Path, parts: list[lab.Matrix], results: list[lab.Record]) -> None:
    """Draw both traces and the test error along the training: a row a problem and depth."""
    keys = ("tr H", "tr diag(H)^1/2", "test error")
    rows = [(part, result, depth, rates) for part, result in zip(parts, results, strict=True)
            for depth, rates in part.rates]  # fmt: skip
    fig, axes = plt.subplots(len(rows), 3, figsize=(9, 2.5 * len(rows)), squeeze=False, sharex=True)
    for line, (part, result, depth, rates) in zip(axes, rows, strict=True):
        curves = result[str(depth)]["curves"]
        step = np.linspace(0, part.steps / 1000, lab.LOOKS + 1)
        shades = (("#56B4E9", "--"), (BLUE, "-"))[-len(rates) :]
        kinds = [(lab.Setting(lr).name, *shade) for lr, shade in zip(rates, shades, strict=True)]
        kinds += [(lab.Setting(lr, 0.5).name, *shade) for lr, shade in
                  zip(lab.ADAM_RATES, ((ORANGE, "-"), ("#E69F00", "--")), strict=True)]  # fmt: skip
        for ax, key in zip(line, keys, strict=True):
            for name, colour, style in kinds:
                found = np.array([median_interval(look[key]) for look in curves[name]])
                ax.plot(step, found[:, 0], style, color=colour, lw=1.4,
                        label=name.split(", 1 -")[0])  # fmt: skip
                if np.isfinite(found).all():
                    ax.fill_between(step, found[:, 1], found[:, 2], color=colour, alpha=0.2, lw=0)
            ax.set_yscale("log")
            tidy(ax)
            ax.set_title(f"{key}, L = {depth}, {part.d} × {part.d} of rank {part.rank}",
                         fontsize=8.5)  # fmt: skip
            ax.xaxis.set_major_locator(MaxNLocator(4))
        line[0].legend(fontsize=7, frameon=True, framealpha=0.9)
    for ax in axes[-1]:
        ax.set_xlabel("thousands of steps")
    fig.tight_layout()
    fig.savefig(file, dpi=110)
    plt.close(fig)
