"""Slices whose values are formulas, with every kind of gap."""

import numpy as np

from sharpkit.landscape import Axis, Marker, Slice, Status

FILTER = "multiples of the filter norm"
DETAILS = {
    "checkpoint": "runs/net.pt",
    "num_examples": {"train": 4096, "test": 512},
    "num_groups": 16,
    "num_parameters": 12345,
    "dtype": "torch.float32",
    "batch_norm": "kept",
    "loss_max": 5.0,
    "tolerance": 0.01,
    "max_check_error": 0.0031,
    "cosine": 0.0012,
    "seed": 3,
    "sharpkit": "0.1.0",
    "torch": "2.13.0",
    "data_fingerprint": "4f1a09c2",
}


def axis(seed=0, kind="filter", label=FILTER, **details):
    return Axis(kind, label, 3.25, seed, details)


def plane(f, nx=21, ny=15, *, axes=None, details=None, markers=(), status=None, name="loss"):
    """A plane of f(x, y) on a grid that is not square; NaN where the status says unknown."""
    x, y = np.linspace(-1, 1, nx), np.linspace(-0.8, 1.2, ny)
    X, Y = np.meshgrid(x, y, indexing="ij")
    values = np.broadcast_to(f(X, Y), X.shape).astype(float)
    known = np.zeros(X.shape, np.int8) if status is None else status(X, Y, values).astype(np.int8)
    return Slice(
        axes or (axis(0), axis(1)),
        (x, y),
        {name: np.where(known > Status.INTERPOLATED, np.nan, values)},
        known,
        markers=markers,
        details=DETAILS if details is None else details,
    )


def bowl(**named):
    return plane(
        lambda x, y: 0.02 + 2 * x**2 + 6 * y**2 + 1.5 * x * y,
        markers=(Marker("theta", (0.0, 0.0)),),
        **named,
    )


def saddle(**named):
    """Over four decades; each axis is an eigenvector of its own length."""
    axes = tuple(
        Axis("eigen", f"steps of {n} along the eigenvector of the {end} eigenvalue", n, None, {})
        for n, end in ((0.5, "largest"), (2.0, "smallest"))
    )
    return plane(lambda x, y: 10 ** (2 * (x**2 - y**2)), axes=axes, **named)


def holes(**named):
    """What is cut, skipped, not finite (one point and a disc) and missing."""

    def status(x, y, values):
        found = np.zeros(x.shape)
        found[values > 5] = Status.CUT
        found[values > 7] = Status.SKIPPED
        found[(x + 0.4) ** 2 + (y - 0.3) ** 2 < 0.04] = Status.NOT_FINITE
        found[14, 7] = Status.NOT_FINITE
        found[:2, :2] = Status.MISSING
        found[8:11, 3:5] = Status.INTERPOLATED
        return found

    return plane(
        lambda x, y: 0.05 + 4 * x**2 + 7 * y**2 + 2 * np.sin(3 * x) * y,
        status=status,
        markers=(Marker("theta", (0.0, 0.0)),),
        **named,
    )


def path():
    """A trajectory of eight checkpoints, the early ones off the plane."""
    s = np.linspace(0, 1, 8)
    x, y = -0.85 + np.sqrt(s), 0.8 * np.cos(3 * s) * (1 - s)
    markers = [Marker("theta", (0.2, 0.02))]
    markers += [
        Marker(f"epoch {10 * k}", (float(a), float(b)), 0.3 if k < 6 else 0.0)
        for k, (a, b) in enumerate(zip(x, y, strict=True))
    ]
    axes = tuple(
        axis(
            None, "trajectory", f"{n} principal component, in units of theta", explained_variance=v
        )
        for n, v in (("first", 0.83), ("second", 0.12))
    )
    return plane(
        lambda x, y: 0.01 + 3 * (x - 0.2) ** 2 + 8 * (y - 0.1 * x) ** 2,
        axes=axes,
        markers=tuple(markers),
    )


def line(*, scale=1.0, title=None, gaps=True, sets=("train", "test"), accuracy=True, n=21):
    """Losses, perhaps an accuracy; every second point interpolated, one not finite, three cut."""
    x = np.linspace(-1, 1, n)
    status = np.zeros(n, np.int8)
    if gaps:
        status[1::2] = Status.INTERPOLATED
        status[-3:] = Status.CUT
        status[4] = Status.NOT_FINITE
    known = np.where(status > Status.INTERPOLATED, np.nan, 1.0)
    values = {f"{s}/loss": known * (0.05 + (3 + k) * scale * x**2) for k, s in enumerate(sets)}
    if accuracy:
        values[f"{sets[-1]}/accuracy"] = known * (0.97 - 0.2 * x**2)
    return Slice(
        (axis(0),),
        (x,),
        values,
        status,
        dict.fromkeys(values, 0.05 * known),
        {name: known * 0.08 * abs(x) for name in values},
        quadratic=0.05 + 9 * scale * x**2,
        markers=(Marker("theta", (0.0,)),),
        details={**DETAILS, "cosine": None, **({"title": title} if title else {})},
    )
