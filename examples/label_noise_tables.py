"""The tables of the comparison under label noise."""

from __future__ import annotations

import math
from collections.abc import Sequence

import label_noise_runs as lab
import numpy as np
from label_noise_figures import LEAST, chosen, column, flag, median_interval, middle_settings


def number(value: float) -> str:
    """Return three digits without an exponent where that is short."""
    if not math.isfinite(value):
        return "diverged"
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    text = f"{round(value, digits):,.{max(digits, 0)}f}"
    return text if abs(value) >= 1e-3 or value == 0 else f"{value:.1e}"


def with_interval(values: Sequence[float]) -> str:
    """Return a median and its interval."""
    if not np.isfinite(values).all():
        return "diverged"
    middle, low, high = median_interval(values)
    if not math.isfinite(low):
        return f"{number(middle)} (no interval)"
    return f"{number(middle)} [{number(low)}, {number(high)}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [" | ".join(head), "|".join(["---"] * len(head)), *(" | ".join(r) for r in rows)]
    return "\n".join(f"| {line} |" if "---" not in line else f"|{line}|" for line in lines)


def losses_table(part: lab.Sparse, result: lab.Record) -> str:
    """Return medians of the test loss and how many runs recovered: a row a setting."""
    rows = []
    for name in [LEAST, *(s.name for s in part.settings)]:
        cells = [name]
        for n in part.sizes:
            if name == LEAST:
                runs, mark = chosen(result["least"], n=n), ""
            else:
                runs = chosen(result["runs"], n=n, name=name)
                mark = flag(runs)
            good = sum(r["recovered"] for r in runs)
            middle = float(np.median(column(runs, "test loss")))
            cells.append(f"{number(middle)} ({good}){mark}")
        rows.append(cells)
    return table(["test loss (recovered)", *(f"n = {n}" for n in part.sizes)], rows)


def pairs_table(part: lab.Sparse, result: lab.Record) -> str:
    """Return the ratios of Adam to SGD, paired by seed, at the middle rates."""
    plain, other = middle_settings(part)
    rows = []
    for n in part.sizes:
        two = [chosen(result["runs"], n=n, name=name) for name in (other, plain)]
        cells = [str(n)]
        for name in ("test loss", "tr H", "tr diag(H)^1/2"):
            ratio = [a[name] / b[name] for a, b in zip(*two, strict=True)]
            cells.append(with_interval(ratio))
        counts = [sum(r["recovered"] for r in runs) for runs in two]
        better = sum(a["recovered"] and not b["recovered"] for a, b in zip(*two, strict=True))
        worse = sum(b["recovered"] and not a["recovered"] for a, b in zip(*two, strict=True))
        cells += [
            f"{counts[0]} / {counts[1]}",
            f"{better} / {worse}",
            flag(two[0] + two[1]).strip(),
        ]
        rows.append(cells)
    head = ["n", "test loss", "tr H", "tr diag(H)^1/2", "recovered, Adam / SGD",
            "Adam only / SGD only", "not converged"]  # fmt: skip
    return table(head, rows)


def summary_table(part: lab.Sparse, result: lab.Record, plain: str) -> str:
    """Return how often each setting is below and above the SGD that is compared."""
    rows = []
    against = [chosen(result["runs"], n=n, name=plain) for n in part.sizes]
    for s in part.settings:
        mine = [chosen(result["runs"], n=n, name=s.name) for n in part.sizes]
        cells = [s.name]
        for name in ("test loss", "tr H", "tr diag(H)^1/2"):
            said = [
                verdict([a[name] / b[name] for a, b in zip(*two, strict=True)])
                for two in zip(mine, against, strict=True)
            ]
            cells.append(" / ".join(str(said.count(v)) for v in ("lower", "undecided", "higher")))
        pairs = [
            (a["recovered"], b["recovered"])
            for two in zip(mine, against, strict=True)
            for a, b in zip(*two, strict=True)
        ]
        cells.append(str(sum(a for a, _ in pairs)))
        cells.append(f"{pairs.count((True, False))} / {pairs.count((False, True))}")
        cells.append(str(sum(not r["converged"] for runs in mine for r in runs)))
        if s.name == plain:
            cells[1:4], cells[5] = [""] * 3, ""
        rows.append(cells)
    least = sum(r["recovered"] for r in result["least"])
    rows.append([LEAST, *[""] * 3, str(least), "", ""])
    head = ["lower / undecided / higher", "test loss", "tr H", "tr diag(H)^1/2", "recovered",
            "it alone / SGD alone", "not converged"]  # fmt: skip
    return table(head, rows)


def verdict(ratios: Sequence[float]) -> str:
    """Say whether the interval of a ratio leaves 1 out."""
    if not np.isfinite(ratios).all():
        return "diverged"
    _, low, high = median_interval(ratios)
    return "lower" if high < 1 else "higher" if low > 1 else "undecided"


def ends_table(part: lab.Sparse, result: lab.Record, n: int) -> str:
    """Return what the runs of one size end with."""
    rows = []
    for s in part.settings:
        runs = chosen(result["runs"], n=n, name=s.name)
        cells = [s.name, *(with_interval(column(runs, k)) for k in ("tr H", "tr diag(H)^1/2"))]
        for k in ("l1", "l0.5", "test loss of the mean", "over the floor"):
            cells.append(number(float(np.median(column(runs, k)))))
        worst = max(column(runs, "drift"), key=abs)
        cells += [f"{100 * worst:+.1f}%", f"{sum(r['converged'] for r in runs)} of {len(runs)}"]
        rows.append(cells)
    least = chosen(result["least"], n=n)
    norms = [number(float(np.median(column(least, k)))) for k in ("l1", "l0.5")]
    traces = [number(4 * float(np.median(column(least, "l1")))), ""]
    rows.append([LEAST, *traces, *norms, *[""] * 4])
    head = ["", "tr H", "tr diag(H)^1/2", "l1", "l0.5", "test loss of the mean w",
            "train loss / floor", "largest drift", "converged"]  # fmt: skip
    return table(head, rows)


def every_run_table(part: lab.Sparse, result: lab.Record) -> str:
    """Return every run of an experiment of few seeds."""
    rows = []
    for n in part.sizes:
        least = chosen(result["least"], n=n)
        rows.append([str(n), LEAST, ", ".join(number(r["test loss"]) for r in least), "", "",
                     ", ".join(number(r["l1"]) for r in least), "", ""])  # fmt: skip
        for s in part.settings:
            runs = chosen(result["runs"], n=n, name=s.name)
            marked = ", ".join(
                number(r["test loss"]) + ("" if r["converged"] else " †") for r in runs
            )
            cells = [
                ", ".join(number(r[k]) for r in runs) for k in ("tr H", "tr diag(H)^1/2", "l1")
            ]
            ratios = ", ".join(number(r["over the floor"]) for r in runs)
            drifts = ", ".join(f"{100 * r['drift']:+.1f}%" for r in runs)
            rows.append([str(n), s.name, marked, *cells, ratios, drifts])
    head = ["n", "", "test loss", "tr H", "tr diag(H)^1/2", "l1", "train loss / floor", "drift"]
    return table(head, rows)


def recovery_said(part: lab.Sparse, result: lab.Record) -> str:
    """Say from which size on the seeds recover, by setting, counting converged runs alone."""
    said = []
    for name in [LEAST, *(s.name for s in part.settings)]:
        sizes = []
        for n in part.sizes:
            runs = chosen(result["least" if name == LEAST else "runs"], n=n)
            runs = [r for r in runs if name == LEAST or r["name"] == name]
            kept = [r for r in runs if r.get("converged", True)]
            sizes.append(len(kept) == len(runs) and all(r["recovered"] for r in kept))
        whole = [n for i, n in enumerate(part.sizes) if all(sizes[i:])]
        said.append(f"{name}: {min(whole)}" if whole else f"{name}: none")
    return (
        "Smallest n from which on every seed has converged and recovered: " + "; ".join(said) + "."
    )


def seen_sparse(part: lab.Sparse, result: lab.Record) -> str:
    """Say what the runs of the small network show, in numbers of theirs."""
    kinds: dict[str, list[lab.Setting]] = {}
    for s in part.settings:
        kinds.setdefault({0.0: "SGD", 0.5: "Adam"}.get(s.power, "AdamE"), []).append(s)
    counts = []
    for kind, settings in kinds.items():
        found = [sum(r["recovered"] for r in result["runs"] if r["name"] == s.name)
                 for s in settings]  # fmt: skip
        counts.append(f"{kind} {min(found)} to {max(found)}")
    least = sum(r["recovered"] for r in result["least"])
    last = part.sizes[-1]
    ranges = {}
    for kind in ("Adam", "SGD"):
        for name in ("tr H", "tr diag(H)^1/2"):
            found = [
                float(np.median(column(chosen(result["runs"], n=last, name=s.name), name)))
                for s in kinds.get(kind, [])
            ]
            ranges[kind, name] = f"{number(min(found))} to {number(max(found))}"
    return (
        f"Recovered of {len(part.sizes) * part.seeds} runs, over all sizes: the {LEAST} {least};"
        f" settings of {'; of '.join(counts)}. At n = {last} the teacher's own traces are"
        f" tr H = {4 * part.kappa} and tr diag(H)^1/2 = {2 * part.kappa}; the medians of"
        f" Adam's settings are {ranges['Adam', 'tr H']} and {ranges['Adam', 'tr diag(H)^1/2']},"
        f" those of SGD's {ranges['SGD', 'tr H']} and {ranges['SGD', 'tr diag(H)^1/2']}."
    )


def seen_matrix(parts: list[lab.Matrix], results: list[lab.Record]) -> str:
    """Say in how many of the problems the claims about the paper's Adam hold."""
    said: dict[str, list[str]] = {"tr diag(H)^1/2": [], "tr H": [], "test error": []}
    risen = 0
    for part, result in zip(parts, results, strict=True):
        for depth, rates in part.rates:
            curves = result[str(depth)]["curves"]
            mine, plain = (curves[lab.Setting(*s).name]
                           for s in ((lab.ADAM_RATES[0], 0.5), (rates[-1],)))  # fmt: skip
            for key, found in said.items():
                found.append(verdict(lab.ends(mine, key)[1] / lab.ends(plain, key)[1]))
            risen += float(np.median(rises(mine))) > 1.1
    total = len(said["tr H"])
    words = [
        f"{key} is lower in {found.count('lower')}, undecided in {found.count('undecided')} and"
        f" higher in {found.count('higher')}"
        for key, found in said.items()
    ]
    return (
        f"Of the {total} pairs of problem and depth, with Adam at lr {lab.ADAM_RATES[0]:g}:"
        f" {'; '.join(words)}. Its tr H rises by more than 10% after a lower value in {risen}."
    )


def matrix_rows(part: lab.Matrix, result: lab.Record) -> list[list[str]]:
    """Return the ends of one matrix experiment, a row an optimizer and depth."""
    rows = []
    for depth, _ in part.rates:
        for name, curve in result[str(depth)]["curves"].items():
            cells = [f"{part.d}, {part.rank}", str(depth), name]
            moved = np.zeros(part.seeds, dtype=bool)
            for key in ("tr H", "tr diag(H)^1/2", "test error"):
                old, new = lab.ends(curve, key)
                cells.append(with_interval(new.tolist()))
                scale = lab.RECOVERED if key == "test error" else 0.0
                moved |= [not lab.settled(a, b, scale) for a, b in zip(old, new, strict=True)]
            cells.append(number(float(np.median(lab.ends(curve, "train loss")[1]))))
            cells.append(with_interval(rises(curve)))
            cells.append(f"†{moved.sum()}" if moved.any() else "")
            rows.append(cells)
    return rows


def rises(curve: list[dict[str, list[float]]]) -> list[float]:
    """Return the largest later over earlier tr H of each seed: 1 if it only falls."""
    values = np.array([look["tr H"] for look in curve])
    smooth = np.exp(np.log(values)[: len(values) // 5 * 5].reshape(-1, 5, values.shape[1]).mean(1))
    return (smooth / np.minimum.accumulate(smooth, axis=0)).max(axis=0).tolist()


def matrix_pairs(part: lab.Matrix, result: lab.Record) -> list[list[str]]:
    """Return ratios of each Adam to the SGD of the larger rate, paired by seed."""
    rows = []
    for depth, rates in part.rates:
        curves = result[str(depth)]["curves"]
        plain = lab.Setting(rates[-1]).name
        for name in curves:
            if name.startswith("Adam"):
                cells = [f"{part.d}, {part.rank}", str(depth), f"{name} / {plain}"]
                for key in ("tr H", "tr diag(H)^1/2", "test error"):
                    ratio = lab.ends(curves[name], key)[1] / lab.ends(curves[plain], key)[1]
                    cells.append(f"{with_interval(ratio.tolist())} {verdict(ratio.tolist())}")
                rows.append(cells)
    return rows


def agreement(rows: list[lab.Record], measured: str, closed: str) -> float:
    """Return the largest relative difference of sharpkit's number to the closed form."""
    return max(abs(r[measured] / r[closed] - 1) for r in rows)
