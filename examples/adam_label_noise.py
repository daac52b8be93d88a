"""Does Adam find sparser networks than SGD under label noise? Measured on two linear networks.

    python examples/adam_label_noise.py [-o docs/adam-label-noise.md] [--quick]
        [--keep FOLDER] [--only scaled|large|matrix]

The experiments of Li, Wen and Lyu (arXiv 2511.02773): diagonal linear networks at a sparse
teacher, where Adam should minimize tr(diag(H)^1/2) and SGD tr H, and deep matrix factorization,
where the same preference should hurt. Three parts; --keep writes the numbers of each to a folder
and takes those that are there, --only stops after one part.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import label_noise_nets as nets
import label_noise_runs as lab
import numpy as np
import torch
from label_noise_figures import (
    LEAST,
    chosen,
    column,
    flag,
    matrix_figure,
    median_interval,
    middle_settings,
    sparse_figure,
)

Results = dict[str, list[lab.Record]]


def number(value: float) -> str:
    """Return three digits without an exponent where that is short."""
    if not math.isfinite(value):
        return "diverged"
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    text = f"{round(value, digits):,.{max(digits, 0)}f}"
    return text if abs(value) >= 1e-3 or value == 0 else f"{value:.1e}"


def with_interval(values: Sequence[float]) -> str:
    """Return a median and its interval."""
    middle, low, high = median_interval(values)
    if not math.isfinite(middle):
        return "diverged"
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


def agreement(result: lab.Record, measured: str, closed: str) -> float:
    """Return the largest relative difference of sharpkit's number to the closed form."""
    rows = [r for r in result["measured"] if math.isfinite(r[closed])]
    return max(abs(r[measured] / r[closed] - 1) for r in rows)


def write(output: Path, parts: dict[str, list[Any]], results: Results) -> None:
    """Write the page and its two figures."""
    small, large = parts["scaled"][0], parts["large"][0]
    one, big = results["scaled"][0], results["large"][0]
    first, second = (output.with_suffix(".png"), output.with_name(f"{output.stem}-matrix.png"))
    sparse_figure(first, small, large, one, big)
    matrix_figure(second, parts["matrix"], results["matrix"])
    plain, other = middle_settings(small)
    spent = ", ".join(f"{name} {found[0]['seconds']:.0f} s" for name, found in results.items())
    near, far = small.sizes[len(small.sizes) // 2 - 1], small.sizes[-1]
    exact = [r["exact"] / r["ggn"] - 1 for r in one["measured"] if math.isfinite(r["ggn"])]
    factored = [
        r for result in results["matrix"] for d in ("2", "5") for r in result[d]["measured"]
    ]
    matrices = {"measured": factored}
    rates = "; ".join(
        f"{', '.join(f'{lr:g}' for lr in rates)} at depth {depth}"
        for depth, rates in parts["matrix"][0].rates
    )
    head = ["d, rank", "depth", "", "tr H", "tr diag(H)^1/2", "test error"]
    blocks = list(zip(parts["matrix"], results["matrix"], strict=True))
    ends_of_all = [row for part, result in blocks for row in matrix_rows(part, result)]
    pairs_of_all = [row for part, result in blocks for row in matrix_pairs(part, result)]
    counted = [recovery_said(part, found) for part, found in ((small, one), (large, big))]
    matrix = parts["matrix"][0]
    output.write_text(
        f"""# Adam and SGD under label noise

Written by `python examples/adam_label_noise.py` (CPU time on one core: {spent}). Li, Wen and Lyu
([2511.02773](https://arxiv.org/abs/2511.02773)) derive that with fresh noise on the labels at every
step SGD drifts along the minimizers towards smaller tr H, and Adam towards smaller tr diag(H)^1/2
(`hessian_trace` and `adam_sharpness`). They show that Adam then needs fewer examples to find a
sparse teacher with diagonal linear networks, and does worse in deep matrix factorization. Both are
measured here.

**What is ours.** The paper's text gives d = 10,000, κ = 50, inputs of random signs, and for
matrices n = 100, depths 2 and 5, Adam with lr 0.001 and (0.9, 0.999). We know neither its learning
rates, β₂, level of noise, initial weights, batch size, numbers of steps and seeds for the diagonal
networks, nor sizes, rank, noise and SGD's learning rate for the matrices. All of these are ours.
Rates were chosen in short trials (four seeds and four sizes of the small network, one size of the
large, one matrix), so that trainings stay stable and settle within the time: Adam's first ones,
0.0005 to 0.002, were too slow, at d = 10,000 also 0.004. Nothing was changed after the runs below.

Adam is torch's (β₁ = {nets.BETA1}, ε = {nets.EPS:g}, with the correction of the first steps, which
the theory leaves out); AdamE-λ divides by v^λ + ε. The theory has 1 − β₂ = c lr² with c of order
1; there the memory of v would be as long as our trainings, so c is 10 or 100, and AdamE and the
matrices have β₂ = 0.999. Weights are float32, many runs at once (steps checked against torch's
optimizers in float64); the numbers below are computed from them in float64.

**Intervals** are medians over seeds with the order statistics that hold the median with at
least 95% (96.1% for 9 values, 96.9% for 6): the values have two peaks, recovered or not, where a
bootstrap of so few covers too rarely. Ratios are paired by seed: the same teacher, inputs, initial
weights, mini-batches and noise. No correction is made for the number of comparisons.

**†k**: k of the runs in a cell have not converged, so the number is no end point; in the figure
their marks are hollow. Numbers are means over the last fifth of a training. Converged: from the
fifth before, the optimizer's own regularizer tr(diag(H)^e), e = 1 − λ, changed by less than
{100 * lab.SETTLED:g}%; the test loss did so too, or, for a run that has recovered, the mean ŵ has
less than half of it, so that what is left is noise; and the train loss without the noise is at most
{lab.FLOOR:g} times the floor that the noise keeps up on the minimizers. For small steps that floor
is lr/4 (δ²/B)^e tr(diag(H)^e) (derived and tested here). Slower drifts are not seen: "converged"
does not prove that more steps would change nothing. The criterion for recovered runs was written
after a first look at the numbers, where the noise of the test loss alone had flagged them.

## What is seen

- **d = {small.d}.** {seen_sparse(small, one)} The paper's abrupt against gradual recovery is not what
  tells them apart here: see the table of pairs below.
- Why Adam's tr diag(H)^1/2 grows with lr and with c: its steps do not shrink with the weight, so
  weights that should be zero keep a scatter that grows with lr, and the more the faster v forgets.
  The theory is of lr → 0 at fixed c.
- **d = {large.d:,}.** {counted[1]}
- **Matrices.** {seen_matrix(parts["matrix"], results["matrix"])}

## Diagonal networks, d = {small.d}, κ = {small.kappa}

ŵ = u∘u − v∘v, L = ½ mean (⟨z, ŵ⟩ − y)², κ weights ±1 in the teacher, all initial weights
{lab.START}, label noise δ = {small.noise:g}, batches of B = {small.batch} with replacement,
{small.steps:,} steps at constant rates, {small.seeds} seeds (teacher, inputs, batches, noise). The
test loss ½‖ŵ − w*‖² is exact. Recovered: a test loss below {lab.RECOVERED:.0%} of that of
ŵ = 0, here {lab.RECOVERED * small.kappa / 2:g}, which is the paper's "below 1" at κ = 50.
"{LEAST}": the interpolating ŵ of smallest l1 norm, by linear programming: the minimizer of tr H
among all interpolating networks.

![Test loss and recovery against the number of examples]({first.name})

*a, c, d: medians; bands are intervals of the medians, in a for the middle rates; grey line:
recovered below it; hollow: not all runs converged; the least l1 norm recovers exactly, below the
axis. b: shares with 95% intervals of Clopper and Pearson, whether converged or not.*

{losses_table(small, one)}

All against the SGD of the middle rate ({plain}), paired by seed: at how many of the
{len(small.sizes)} sizes the interval of the ratio is below 1, holds it, or is above; how many runs
of {len(small.sizes) * small.seeds} recovered, and of how many pairs one alone did.

{summary_table(small, one, plain)}

Size by size, at the middle rates ({other}; {plain}): ratios, the seeds that recovered,
and those that did with one of the two only.

{pairs_table(small, one)}

{counted[0]}

What they end with, at n = {near} and n = {far}. The mean w is the average of ŵ over the looks of
the last fifth, which takes most of the noise out; the largest drift is that of the own regularizer,
of the worst seed.

n = {near}:

{ends_table(small, one, near)}

n = {far}:

{ends_table(small, one, far)}

## Diagonal networks, d = {large.d:,}, κ = {large.kappa}

As above with batches of {large.batch}, {large.steps:,} steps, and {large.seeds} seeds, too few for
an interval: every run is shown, the seeds in the same order. Recovered below
{lab.RECOVERED * large.kappa / 2:g}.

{every_run_table(large, big)}

## Deep matrix factorization

W = W_L ⋯ W_1, L = mean (⟨A, W⟩ − b)², A of independent N(0, 1), n = {matrix.n}, a teacher with all
non-zero singular values 1, initial weights N(0, 1/d), label noise {matrix.noise:g}, batches of
{matrix.batch}, {matrix.steps:,} steps, {matrix.seeds} seeds. SGD's rates ({rates}) are the two
largest of 0.005, 0.01 and 0.02 that did not diverge in a trial; Adam's are the paper's 0.001, and
0.003. The test error is ‖W − M‖²/‖M‖², so 1 is that of W = 0. "Rise of tr H": the largest later
over earlier value, of geometric means of five looks each; 1 if it only falls, and a few percent
more by noise. †k: runs of which tr H, tr diag(H)^1/2 or the test error changed by 5% or more
from the last but one fifth (of a test error: of itself, or of {lab.RECOVERED:g} if
that is more).

![Traces and test error along the training]({second.name})

*Medians over seeds and their intervals.*

{table([*head, "train loss", "rise of tr H", "not converged"], ends_of_all)}

Adam over SGD of the larger rate, paired by seed; "undecided": the interval holds 1.

{table(["d, rank", "depth", "", *head[3:]], pairs_of_all)}

## Measured with sharpkit

The closed forms above were measured with sharpkit too, at the end points of the first seed of every
setting. Diagonal networks, d = {small.d}: tr H = 4‖θ‖² (also off the minimizers), largest relative
difference {agreement(one, "trace", "closed tr H"):.1g}; tr diag(H)^1/2 = 2‖θ‖₁,
`adam_sharpness(method="ggn")`, {agreement(one, "ggn", "closed tr diag(H)^1/2"):.1g}. With
d = {large.d:,}: {agreement(big, "trace", "closed tr H"):.1g} (64 probes) and
{agreement(big, "ggn", "closed tr diag(H)^1/2"):.1g}. Matrices, where diag(H) is the Gauss-Newton
matrix's everywhere: {agreement(matrices, "trace", "closed tr H"):.1g} and
{agreement(matrices, "ggn", "closed tr diag(H)^1/2"):.1g}.

A trap: with the Hessian's own diagonal (`method="exact"`) the same end points give
{100 * min(exact):.0f}% to {100 * max(exact):.0f}% more. Label noise keeps the weights off the
minimizers, residuals put entries of both signs where there should be zeros, and the root of the
positive ones adds up. Use `"ggn"` for this measure where training has noise.
"""
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Train, measure, compare, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/adam-label-noise.md"))
    parser.add_argument("--quick", action="store_true", help="tiny networks, few steps")
    parser.add_argument("--keep", type=Path, help="a folder for the numbers of each part")
    parser.add_argument("--only", choices=("scaled", "large", "matrix"), help="one part, no page")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # weights go to zero, and SGD's take their time
    full: dict[str, list[Any]] = {
        "scaled": [lab.SCALED],
        "large": [lab.LARGE],
        "matrix": [*lab.MATRICES],
    }
    parts = {name: lab.quick(name) if options.quick else full[name] for name in full}
    results: Results = {}
    for name in [options.only] if options.only else parts:
        kept = options.keep / f"{name}.json" if options.keep else None
        if kept is not None and kept.exists():
            results[name] = json.loads(kept.read_text())
            continue
        began = time.process_time()

        def tell(what: str, began: float = began) -> None:
            print(f"{what}: {time.process_time() - began:.0f} s", flush=True)

        train = lab.matrix_part if name == "matrix" else lab.sparse_part
        results[name] = [train(part, tell) for part in parts[name]]  # type: ignore[operator]
        results[name][0]["seconds"] = time.process_time() - began
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(results[name]))
    torch.set_flush_denormal(False)
    if options.only is None:
        write(options.output, parts, results)


if __name__ == "__main__":
    main()
