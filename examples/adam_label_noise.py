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
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import label_noise_nets as nets
import label_noise_runs as lab
import torch
from label_noise_figures import LEAST, matrix_figure, middle_settings, sparse_figure
from label_noise_tables import (
    agreement,
    ends_table,
    every_run_table,
    losses_table,
    matrix_pairs,
    matrix_rows,
    pairs_table,
    recovery_said,
    seen_matrix,
    seen_sparse,
    summary_table,
    table,
)

Results = dict[str, list[lab.Record]]


CLOSED = (("trace", "closed tr H"), ("ggn", "closed tr diag(H)^1/2"))


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
    exact = [r["exact"] / r["ggn"] - 1 for r in one["measured"]]
    probed = max(abs(r["trace"] - r["closed tr H"]) / r["trace error"] for r in big["measured"])
    factored = [
        r for result in results["matrix"] for d in ("2", "5") for r in result[d]["measured"]
    ]
    checks = [
        [name, *(f"{agreement(rows, a, b):.1g}" for a, b in CLOSED)]
        for name, rows in (
            (f"diagonal, d = {small.d}", one["measured"]),
            (f"diagonal, d = {large.d:,}", big["measured"]),
            ("matrices", factored),
        )
    ]
    head = ["d, rank", "depth", "", "tr H", "tr diag(H)^1/2", "test error"]
    blocks = list(zip(parts["matrix"], results["matrix"], strict=True))
    ends_of_all = [row for part, result in blocks for row in matrix_rows(part, result)]
    pairs_of_all = [row for part, result in blocks for row in matrix_pairs(part, result)]
    seen = [
        f"**d = {small.d}.** {seen_sparse(small, one)} Adam and SGD recover over the same"
        " range of n, where some seeds have and others have not: an abrupt against a gradual fall"
        " is not seen at this size.",
        "Adam's tr diag(H)^1/2 grows with lr and with c, to above SGD's: its steps do not shrink"
        " with the weight, so weights that should be zero keep a scatter of the order of lr, larger"
        " where v forgets faster. The theory is of lr → 0 at fixed c, where this goes away.",
        f"**d = {large.d:,}**, {large.seeds} seeds. {recovery_said(large, big)} The fall is abrupt"
        " for the Adam of the larger 1 − β₂ and gradual for SGD, as in the paper. But the minimizer"
        " of SGD's own regularizer recovers where SGD has not: after these steps the difference is"
        " one of how fast they drift, and says nothing of which minimum they drift to.",
        "**Matrices.** "
        + " ".join(seen_matrix(parts["matrix"], results["matrix"], lr) for lr in lab.ADAM_RATES)
        + " So a lower tr diag(H)^1/2 is seen where Adam is done or nearly so, a higher tr H then"
        " at depth 2, and a worse test error only where Adam is still on its way. SGD has converged"
        " in the smaller problem at depth 2 alone, so elsewhere these are paths, not ends.",
    ]
    bullets = "\n".join("- " + text for text in seen)
    matrix = parts["matrix"][0]
    text = f"""# Adam and SGD under label noise

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
0.0005 to 0.002, were too slow, at d = 10,000 also 0.004. A first run of the larger matrix diverged
with the rates of the smaller and was repeated with half of them. Nothing else was changed for what
came out.

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
does not prove that more steps would change nothing. Therefore SGD is also flagged where it has not
recovered but the least l1 norm has, to which it must go. The criteria for recovered runs and for
the least l1 norm were written after a first look at the numbers: noise alone had flagged the
first, and the second were slower than the others can see.

## What is seen

{bullets}

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

{recovery_said(small, one)}

What they end with, at n = {near} and n = {far}. The mean w is the average of ŵ over the looks of
the last fifth, which takes most of the noise out; the largest drift is that of the own regularizer,
of the worst seed.

n = {near}:

{ends_table(small, one, near)}

n = {far}:

{ends_table(small, one, far)}

## Diagonal networks, d = {large.d:,}, κ = {large.kappa}

As above with batches of {large.batch}, {large.steps:,} steps, {large.seeds} seeds, too few for
an interval: every run is shown, the seeds in the same order. Recovered below
{lab.RECOVERED * large.kappa / 2:g}.

{every_run_table(large, big)}

## Deep matrix factorization

W = W_L ⋯ W_1, L = mean (⟨A, W⟩ − b)², A of independent N(0, 1), n = {matrix.n}, a teacher with all
non-zero singular values 1, initial weights N(0, 1/d), label noise {matrix.noise:g}, batches of
{matrix.batch}, {matrix.steps:,} steps, {matrix.seeds} seeds. SGD's rates are the two largest of
0.0025, 0.005, 0.01 and 0.02 that did not diverge in a short trial; Adam's are the paper's 0.001,
and 0.003. The test error is ‖W − M‖²/‖M‖², so 1 is that of W = 0. "Rise of tr H": the largest later
over earlier value, of geometric means of five looks each; 1 if it only falls, and a few percent
more by noise. †k: runs of which tr H, tr diag(H)^1/2 or the test error changed by 5% or more
from the last but one fifth (of a test error: of itself, or of {lab.RECOVERED:g} if
that is more).

![Traces and test error along the training]({second.name})

*Medians over seeds and their intervals.*

{table([*head, "train loss", "rise of tr H", "not converged"], ends_of_all)}

Adam over SGD of the larger rate, paired by seed; "undecided": the interval holds 1.

{table(["d, rank", "depth", "", *head[3:], "not converged, Adam / SGD"], pairs_of_all)}

## Measured with sharpkit

The closed forms above were measured with sharpkit too, at the end points of the first seed of every
setting; largest relative differences:

{table(["", "tr H, `hessian_trace`", 'tr diag(H)^1/2, `adam_sharpness(method="ggn")`'], checks)}

tr H = 4‖θ‖² holds for the diagonal networks off the minimizers too; for the matrices diag(H) is the
Gauss-Newton matrix's everywhere. At d = {large.d:,} the trace is of 64 probes, off by at most
{probed:.1f} of its stated errors.

A trap: with the Hessian's own diagonal (`method="exact"`) the same end points give
{100 * min(exact):.0f}% to {100 * max(exact):.0f}% more. Label noise keeps the weights off the
minimizers, residuals put entries of both signs where there should be zeros, and the root of the
positive ones adds up. Use `"ggn"` for this measure where training has noise.
"""
    output.write_text(reflow(text))


def reflow(text: str) -> str:
    """Fill paragraphs and items to 100 columns; tables, headings and pictures stay."""
    blocks = []
    for block in text.strip().split("\n\n"):
        if block.startswith(("#", "|", "![")):
            blocks.append(block)
        elif block.startswith("- "):
            items = (filled(line, "  ") for line in block.split("\n"))
            blocks.append("\n".join(items))
        else:
            blocks.append(filled(" ".join(block.split())))
    return "\n\n".join(blocks) + "\n"


def filled(text: str, indent: str = "") -> str:
    return textwrap.fill(
        text, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
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
