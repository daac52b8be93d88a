"""Every kind of slice and path, drawn from networks trained on digits and on Fashion-MNIST.

    python examples/gallery.py [-o docs/gallery.md]

Trains an MLP on scikit-learn's digits (two seeds, checkpoints along the way) and a small
convolutional network and a vision transformer on Fashion-MNIST (see fashion_networks.py for the
data), then draws. The page holds the figures, how each was made, and their captions.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import sharpkit as sk
from sharpkit import landscape as ls
from sharpkit import plots
from sharpkit.landscape.paths import SegmentPath, align, barrier, connect, plane_through

sys.path.insert(0, str(Path(__file__).parent))
import fashion_networks as zoo
import track_digits

CE = nn.CrossEntropyLoss()
REFINE = 0.02
DPI = 150


@dataclass
class Page:
    """The page under way."""

    path: Path
    lines: list[str] = field(default_factory=list)

    def figure(self, name: str, title: str, text: str, code: str, axes: object) -> None:
        """Save a figure, and add it with its text."""
        first = axes[0] if isinstance(axes, tuple) else axes
        folder = self.path.with_suffix("")
        folder.mkdir(parents=True, exist_ok=True)
        plots.save_figure(first, folder / f"{name}.png", dpi=DPI)
        self.lines += [f"## {title}", "", text, "", "```python", code, "```", "",
                       f"![{title}]({folder.name}/{name}.png)", ""]  # fmt: skip
        print(f"{name}.png", flush=True)


# -- networks ----------------------------------------------------------------------------


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return 1,200 training and 597 test images."""
    held = load_digits()
    order = torch.randperm(len(held.target), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(held.data, dtype=torch.float32)[order] / 16
    y = torch.tensor(held.target)[order]
    return (x[:1200], y[:1200]), (x[1200:], y[1200:])


def mlp(seed: int, data: tuple[Tensor, Tensor]) -> tuple[nn.Module, list[Tensor]]:
    """Return a trained MLP, and its parameters every second epoch."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    order = torch.Generator().manual_seed(seed)
    kept = [nn.utils.parameters_to_vector(net.parameters()).detach()]
    for epoch in range(1, 25):
        for rows in torch.randperm(len(data[0]), generator=order).split(50):
            optimizer.zero_grad()
            CE(net(data[0][rows]), data[1][rows]).backward()
            optimizer.step()
        if epoch % 2 == 0:
            kept.append(nn.utils.parameters_to_vector(net.parameters()).detach())
    return net.eval(), kept


def fashion(spec: zoo.Spec, place: Path) -> nn.Module:
    """Return a network of the zoo of Fashion-MNIST, trained."""
    net = zoo.untrained(spec)
    net.load_state_dict(zoo.train(spec, place)["state_dict"])
    return net.eval()


# -- figures -----------------------------------------------------------------------------


def of_digits(page: Page) -> None:
    """Draw what the MLPs show."""
    train, test = digits()
    (net, path), (other, _) = (mlp(seed, train) for seed in (0, 1))
    objective = sk.Objective(net, CE, train)
    sets = {"train": objective, "test": sk.Objective(net, CE, test)}
    b = sk.Objective(other, CE, train)
    about = {"checkpoint": "MLP on digits"}

    line = ls.StraightSection(objective.theta, [ls.random_direction(objective)])
    one = ls.compute_slice(
        line, sets, "-1:1:51", metrics=["accuracy"], quadratic=True, details=about
    )
    page.figure(
        "line", "A line, on training and test data",
        "Bands are 95% intervals of the rise from the centre; the quadratic model is good near it"
        " only.",
        'section = StraightSection(objective.theta, [random_direction(objective)])\n'
        'compute_slice(section, {"train": objective, "test": test}, "-1:1:51",\n'
        '              metrics=["accuracy"], quadratic=True)',
        plots.plot_line(one, caption=True),
    )  # fmt: skip

    plane = ls.StraightSection(
        objective.theta, [ls.random_direction(objective, seed=s) for s in (0, 1)]
    )
    two = ls.compute_slice(
        plane, objective, "-1:1:51", "-1:1:51", refine=REFINE, loss_max=5, details=about
    )
    text = (
        "The same plane twice. It was filled coarse to fine and cut at a loss of 5; the caption"
        " says how many points were measured, and how far interpolation was off where it was"
        " checked."
    )
    code = (
        "section = StraightSection(objective.theta, [random_direction(objective, seed=s) for s in"
        ' (0, 1)])\ncompute_slice(section, objective, "-1:1:51", "-1:1:51", refine=0.02,'
        " loss_max=5)"
    )
    page.figure("plane", "A plane", text, code, plots.plot_contour(two, caption=True))
    page.figure(
        "surface", "The plane as a surface", "Gaps stay gaps.", "plot_surface(found, log=True)",
        plots.plot_surface(two, log=True, caption=True),
    )  # fmt: skip

    found = ls.trajectory_plane(path, [f"epoch {2 * i}" for i in range(len(path))])
    grid = found.grid(51)
    three = ls.compute_slice(
        found.section, objective, *grid, refine=REFINE, markers=found.markers, details=about
    )
    page.figure(
        "trajectory", "A training run in the plane of its principal components",
        " ".join(found.notes),
        "found = trajectory_plane(checkpoints, labels)\n"
        "compute_slice(found.section, objective, *found.grid(51), refine=0.02,\n"
        "              markers=found.markers)",
        plots.plot_contour(three, caption=True),
    )  # fmt: skip

    aligned = align(objective, b, how=("permutation",))
    curve = connect(objective, objective.theta, b.theta, epochs=40, batch_size=50, lr=0.05)
    paths = {
        "straight": SegmentPath(objective.theta, b.theta),
        "after weight matching": SegmentPath(objective.theta, aligned.theta),
        "Bezier curve, trained": curve.path,
    }
    drawn, told = [], []
    for name, way in paths.items():
        drawn.append(
            ls.compute_slice(
                way, objective, "0:1:41", details={"title": name},
                markers=[ls.Marker("A", (0.0,)), ls.Marker("B", (1.0,))],
            )
        )  # fmt: skip
        height = barrier(objective, way, 41)
        told.append(f"{name} {height.value:.3g} ± {height.error:.1g}")
    page.figure(
        "path", "Between two trainings", f"Barriers: {'; '.join(told)}.",
        "aligned = align(a, b, how=('permutation',))\n"
        "curve = connect(a, a.theta, b.theta, epochs=40, batch_size=50, lr=0.05)\n"
        "[compute_slice(p, a, '0:1:41') for p in\n"
        " (SegmentPath(a.theta, b.theta), SegmentPath(a.theta, aligned.theta), curve.path)]",
        plots.plot_line(drawn, caption=True),
    )  # fmt: skip
    section, markers = plane_through(
        objective.theta, b.theta, curve.path.bends[0], labels=("A", "B", "bend")
    )
    at = [m.coordinates for m in markers]
    low, high = (tuple(f(c[k] for c in at) for k in (0, 1)) for f in (min, max))
    room = 0.2 * max(h - m for h, m in zip(high, low, strict=True))
    grid = tuple(
        torch.linspace(m - room, h + room, 51).tolist() for m, h in zip(low, high, strict=True)
    )
    on_curve = []
    for i in range(1, 8):
        theta = curve.path.point([i / 8])
        assert theta is not None
        coordinates, distance = section.coordinates(theta)
        on_curve.append(ls.Marker(f"t = {i / 8:g}", coordinates, distance))
    four = ls.compute_slice(
        section, objective, *grid, refine=REFINE, loss_max=3, details={**about, "trajectory": True},
        markers=[markers[0], *on_curve, markers[1]],
    )  # fmt: skip
    page.figure(
        "bend", "The plane of the curve",
        "Both ends and the bend span it; the points lie on the curve.",
        "section, markers = plane_through(a.theta, b.theta, curve.path.bends[0])",
        plots.plot_contour(four, caption=True),
    )  # fmt: skip

    summary = sk.spectrum(objective, k=5, num_steps=40)
    ends = {p.label: p.value for p in summary["top_eigenvalues"].parts}
    page.figure(
        "spectrum", "The spectrum of the Hessian",
        f"The trace is {summary['hessian_trace']}.",
        "summary = sk.spectrum(objective, k=5, num_steps=40)\n"
        "plot_spectrum(summary.density, ends=(lambda_min, lambda_max), x_scale='log')",
        plots.plot_spectrum(
            summary.density, x_scale="log", ends=(ends["lambda_-1"], ends["lambda_1"]),
            title="MLP on digits",
        ),
    )  # fmt: skip
    frame = track_digits.run(page.path.parent, steps=400, rate=1.0, every=20, probes=8, seed=0)
    (page.path.parent / "track_digits.csv").unlink()
    page.figure(
        "tracking", "Sharpness along training",
        "Full-batch gradient descent: the largest eigenvalue rises to 2/eta and stays about there.",
        "tracker = Tracker(model, loss, data, every=20, trace_probes=8, optimizer=optimizer)\n"
        "...\nplot_tracking(tracker.frame)",
        plots.plot_tracking(frame),
    )  # fmt: skip


def of_fashion(page: Page, place: Path) -> None:
    """Draw what the networks on Fashion-MNIST show."""
    train = zoo.images(place)[0]
    data = list(zip(train[0].split(250), train[1].split(250), strict=True))
    base = zoo.BASE["cnn"]
    plain, flat = (fashion(replace(base, optimizer=o), place) for o in ("sgd", "sam"))
    made = []
    for name, net in (("CNN, SGD", plain), ("CNN, SAM", flat)):
        objective = sk.Objective(net, CE, data)
        section = ls.StraightSection(
            objective.theta, [ls.random_direction(objective, seed=s) for s in (0, 1)]
        )
        made.append(
            ls.compute_slice(
                section, objective, "-0.5:0.5:41", "-0.5:0.5:41", refine=REFINE, loss_max=5,
                details={"checkpoint": name},
            )
        )  # fmt: skip
    page.figure(
        "sides", "Two trainings on one scale", "Levels, colours and axes are shared.",
        "plot_slices([compute_slice(...) for checkpoint in checkpoints])",
        plots.plot_slices(made, caption=True),
    )  # fmt: skip

    objective = sk.Objective(plain, CE, data)
    about = {"checkpoint": "CNN on Fashion-MNIST"}
    (top,) = ls.eigen_directions(objective, 1, rise=0.5)
    (low,) = ls.eigen_directions(objective, 1, which="smallest", rise=0.05)
    eigen = ls.compute_slice(
        ls.StraightSection(objective.theta, [top, low]), objective, "-1:1:41", "-1:1:41",
        refine=REFINE, details=about,
    )  # fmt: skip
    page.figure(
        "eigen", "Along the largest and the most negative eigenvector",
        "Eigenvectors are not rescaled; a step is as long as the quadratic model needs for the"
        " rise, or the fall, that the label states.",
        "(top,) = eigen_directions(objective, 1, rise=0.5)\n"
        "(low,) = eigen_directions(objective, 1, which='smallest', rise=0.05)\n"
        "StraightSection(objective.theta, [top, low])",
        plots.plot_contour(eigen, caption=True),
    )  # fmt: skip
    lines = []
    for name, direction in (
        ("worst-case perturbation", ls.worst_direction(objective, 0.05)),
        ("gradient", ls.gradient_direction(objective, rise=0.02)),
    ):
        scale = 0.05 / direction.axis.step  # the same length for both
        fair = replace(direction, step=direction.step * scale, label="multiples of 0.05 in theta")
        lines.append(
            ls.compute_slice(
                ls.StraightSection(objective.theta, [fair]), objective, "-1:1:41",
                details={"title": name},
            )
        )  # fmt: skip
    page.figure(
        "worst", "The worst perturbation of a ball, beside the gradient",
        "Both are 0.05 long: what an ascent of 20 steps found, and what SAM takes.",
        "worst_direction(objective, rho=0.05); gradient_direction(objective)",
        plots.plot_line(lines, caption=True),
    )  # fmt: skip

    vit = sk.Objective(fashion(zoo.BASE["vit"], place), CE, data)
    scores = sk.score(vit, ["renyi_sharpness_per_layer"])
    page.figure(
        "profile", "A measure by layer", "Rényi sharpness of each layer's weights alone.",
        "scores = sk.score(objective, ['renyi_sharpness_per_layer'])\n"
        "plot_profile(scores[0].estimate)",
        plots.plot_profile(
            scores[0].estimate, label="Rényi sharpness of a layer", title="ViT on Fashion-MNIST"
        ),
    )  # fmt: skip
    geodesic = ls.compute_slice(
        ls.GeodesicSection(vit, ["gradient", "random"]), vit, "-1:1:31", "-1:1:31",
        refine=REFINE, loss_max=8, details={"checkpoint": "ViT on Fashion-MNIST"},
    )  # fmt: skip
    page.figure(
        "geodesic", "Geodesics of the quotient by attention's symmetries",
        "The picture is the same for all parameters of the same function.",
        "GeodesicSection(objective, ['gradient', 'random'])",
        plots.plot_contour(geodesic, caption=True),
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Make the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/gallery.md"))
    parser.add_argument("--folder", type=Path, default=Path("zoo-fashion"), help="for the data")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    started = time.perf_counter()
    page = Page(given.output)
    page.lines += [
        "# Gallery", "",
        "    python examples/gallery.py", "",
        "Every kind of slice and path, of networks trained on scikit-learn's digits and on"
        " Fashion-MNIST (1,000 images of 16x16 pixels). How to make them of your own:"
        " [landscape.md](landscape.md). The text below a figure is its caption, as sharpkit writes"
        " it. `sharpkit.plots.interactive_page(found, \"plane.html\")` makes a page of a slice that"
        " turns.", "",
    ]  # fmt: skip
    steps: list[Callable[[], None]] = [
        lambda: of_digits(page),
        lambda: of_fashion(page, zoo.fetch(given.folder / "data")),
    ]
    for step in steps:
        step()
    given.output.write_text("\n".join(page.lines))
    print(f"{given.output} written in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
