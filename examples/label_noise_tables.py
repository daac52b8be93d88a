"""The tables of the comparison under label noise."""

from __future__ import annotations

import math
from collections.abc import Sequence

import label_noise_runs as lab
import numpy as np
from label_noise_figures import LEAST, chosen, column, flag, median_interval, middle_settings

MATRIX_KEYS = ("tr H", "tr diag(H)^1/2", "test error")


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
    """Say from which size on the seeds recover, by setting."""

    def first(good: list[bool]) -> str:
        whole = [n for i, n in enumerate(part.sizes) if all(good[i:])]
        return str(min(whole)) if whole else "none"

    said = []
    for name in [LEAST, *(s.name for s in part.settings)]:
        if name == LEAST:
            sets = [chosen(result["least"], n=n) for n in part.sizes]
            said.append(f"{name} {first([all(column(r, 'recovered')) for r in sets])}")
            continue
        sets = [chosen(result["runs"], n=n, name=name) for n in part.sizes]
        good = [all(column(r, "recovered")) for r in sets]
        both = [g and not flag(r) for g, r in zip(good, sets, strict=True)]
        said.append(f"{name}: {first(good)} ({first(both)})")
    return "Smallest n from which on every seed recovered (and converged): " + "; ".join(said) + "."


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
        f"Recovered of {len(part.sizes) * part.seeds} runs, over all sizes, converged or not:"
        f" the {LEAST}"
        f" {least};"
        f" settings of {'; of '.join(counts)}. At n = {last} the teacher's own traces are"
        f" tr H = {4 * part.kappa} and tr diag(H)^1/2 = {2 * part.kappa}; the medians of"
        f" Adam's settings are {ranges['Adam', 'tr H']} and {ranges['Adam', 'tr diag(H)^1/2']},"
        f" those of SGD's {ranges['SGD', 'tr H']} and {ranges['SGD', 'tr diag(H)^1/2']}."
    )


def seen_matrix(parts: list[lab.Matrix], results: list[lab.Record], lr: float) -> str:
    """Say in how many of the problems the claims about Adam hold at one rate."""
    said: dict[str, list[str]] = {key: [] for key in MATRIX_KEYS}
    risen = moved = runs = 0
    for part, result in zip(parts, results, strict=True):
        for depth, rates in part.rates:
            curves = result[str(depth)]["curves"]
            mine = curves[lab.Setting(lr, 0.5).name]
            plain = curves[lab.Setting(rates[-1]).name]
            for key, found in said.items():
                found.append(verdict(lab.ends(mine, key)[1] / lab.ends(plain, key)[1]))
            risen += float(np.median(rises(mine))) > 1.1
            moved += moving(mine)
            runs += part.seeds
    words = [
        f"{key} is lower in {found.count('lower')}, undecided in {found.count('undecided')} and"
        f" higher in {found.count('higher')}"
        for key, found in said.items()
    ]
    return (
        f"Adam at lr {lr:g} against SGD, {len(said['tr H'])} cases ({moved} of Adam's {runs} runs"
        f" have not converged): {'; '.join(words)}; Adam's tr H rises by more than 10% after a"
        f" lower value in {risen}."
    )


def matrix_rows(part: lab.Matrix, result: lab.Record) -> list[list[str]]:
    """Return the ends of one matrix experiment, a row an optimizer and depth."""
    rows = []
    for depth, _ in part.rates:
        for name, curve in result[str(depth)]["curves"].items():
            cells = [f"{part.d}, {part.rank}", str(depth), name]
            for key in MATRIX_KEYS:
                cells.append(with_interval(lab.ends(curve, key)[1].tolist()))
            cells.append(number(float(np.median(lab.ends(curve, "train loss")[1]))))
            cells.append(with_interval(rises(curve)))
            moved = moving(curve)
            cells.append(f"†{moved}" if moved else "")
            rows.append(cells)
    return rows


def moving(curve: list[dict[str, list[float]]]) -> int:
    """Return of how many seeds a trace or the test error still changes at the end."""
    moved = set()
    for key in MATRIX_KEYS:
        scale = lab.RECOVERED if key == "test error" else 0.0
        for seed, (old, new) in enumerate(zip(*lab.ends(curve, key), strict=True)):
            if not lab.settled(old, new, scale):
                moved.add(seed)
    return len(moved)


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
                for key in MATRIX_KEYS:
                    ratio = lab.ends(curves[name], key)[1] / lab.ends(curves[plain], key)[1]
                    cells.append(f"{with_interval(ratio.tolist())} {verdict(ratio.tolist())}")
                cells.append(f"{moving(curves[name])} / {moving(curves[plain])}")
                rows.append(cells)
    return rows


def agreement(rows: list[lab.Record], measured: str, closed: str) -> float:
    """Return the largest relative difference of sharpkit's number to the closed form."""
    return max(abs(r[measured] / r[closed] - 1) for r in rows)
