"""What was drawn, in sentences: all that a reader needs to draw a slice again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sharpkit.landscape.result import Slice, Status
from sharpkit.landscape.section import Axis

__all__ = ["caption", "name_of"]

KINDS = {
    "filter": "random, filter-normalized",
    "layer": "random, normalized by tensor",
    "weight": "random, scaled by each weight",
    "theta": "random",
    "eigen": "eigenvector of the Hessian",
    "gradient": "gradient",
    "worst-case": "worst perturbation found in a ball",
    "trajectory": "principal component of the trajectory",
    "between": "from one checkpoint to another",
    "endpoints": "plane of three checkpoints",
    "segment": "straight line",
    "bezier": "Bezier curve",
    "polychain": "polygonal chain",
    "geodesic": "geodesic",
    "tensor": "given vector",
}
NUMBERS = {  # of Axis.details, in words
    "eigenvalue": "eigenvalue",
    "residual": "residual",
    "rise": "rise aimed at",
    "theta_norm": "norm of theta",
    "explained_variance": "explained variance",
}
MOST_NAMES = 4  # of tensors left out
COUNTED = (
    (Status.MEASURED, "measured"),
    (Status.INTERPOLATED, "interpolated"),
    (Status.CUT, "cut"),
    (Status.SKIPPED, "not measured, above it by their neighbours"),
    (Status.NOT_FINITE, "not finite"),
    (Status.OUTSIDE, "outside the section"),
    (Status.MISSING, "not measured yet"),
)
BATCH_NORM = {"kept": "kept as trained", "re-estimated": "re-estimated at every point"}


def caption(slices: Slice | Sequence[Slice]) -> str:
    """Return a caption as plain text on one line.

    It is made from the slice alone, whatever of :attr:`Slice.details` is there: what was
    measured on which data, the directions with their units, seeds and what they leave out,
    the grid, how its points are known, how BatchNorm was treated, and versions. What is not
    known is not mentioned.

    Args:
        slices: One, or several that are shown together: what they share is said once, the
            rest with the slice's name before it.

    Example:
        >>> axis = Axis("filter", "multiples of the filter norm", 2.0, seed=7)
        >>> x = np.linspace(-1, 1, 3)
        >>> print(caption(Slice((axis,), (x,), {"loss": x**2}, np.zeros(3, dtype=np.int8))))
        Loss. x: random, filter-normalized (seed 7), in multiples of the filter norm; x = 1 is 2 from the centre. Grid: x from -1 to 1, 3 points: all measured.
    """  # noqa: E501
    held = [slices] if isinstance(slices, Slice) else list(slices)
    told = [_sentences(s) for s in held]
    if len(held) == 1:
        return " ".join(told[0])
    shared = [t for t in told[0] if all(t in other for other in told)]
    parts = shared.copy()
    for number, (one, sentences) in enumerate(zip(held, told, strict=True), 1):
        own = [t for t in sentences if t not in shared]
        if own:
            parts.append(f"[{name_of(one) or number}] {' '.join(own)}")
    return " ".join(parts)


def name_of(one: Slice) -> str:
    """Return what a legend or a panel calls a slice: its title, or its checkpoint."""
    return _clean(one.details.get("title") or one.details.get("checkpoint") or "")


def _sentences(s: Slice) -> list[str]:
    d = s.details
    found = [_what(s)]
    for letter, axis in zip("xy", s.axes, strict=False):
        found += _axis(letter, axis)
    if s.dim == 2 and d.get("cosine") is not None:
        found.append(f"Cosine of the two directions: {_number(d['cosine'])}.")
    if d.get("canonical"):
        found.append("Taken at the canonical representative of the network.")
    found += _grid(s)
    mode = d.get("batch_norm")
    if mode:
        found.append(f"BatchNorm statistics: {BATCH_NORM.get(str(mode), _clean(mode))}.")
    if s.errors or s.rise_errors:
        groups = d.get("num_groups")
        given = f", from {_counts(groups)} groups of examples" if groups else ""
        found.append(f"Errors are those of the data being a sample{given}.")
    far = max((m.distance for m in s.markers), default=0.0)
    if far > 0:
        found.append(
            f"Points off the section are shown at their nearest point of it; the farthest lies"
            f" {_number(far)} away in theta."
        )
    if d.get("seed") is not None:
        found.append(f"Seed {_clean(d['seed'])}.")
    made = [f"{name} {_clean(d[name])}" for name in ("sharpkit", "torch") if d.get(name)]
    if made:
        found.append(f"Made with {', '.join(made)}.")
    if d.get("data_fingerprint"):
        found.append(f"Data {_short(d['data_fingerprint'])}.")
    if d.get("command"):
        command = d["command"]
        words = command if isinstance(command, str) else " ".join(map(str, command))
        found.append(f"Command: {_clean(words)}")
    return found


def _what(s: Slice) -> str:
    d = s.details
    text = ", ".join(_clean(" ".join(n.rsplit("/", 1))) for n in s.names)
    text = text[:1].upper() + text[1:]
    if d.get("checkpoint"):
        text += f" of {_clean(d['checkpoint'])}"
    about = []
    if d.get("num_parameters"):
        about.append(f"{int(d['num_parameters']):,} parameters")
    if d.get("dtype"):
        about.append(_clean(d["dtype"]).removeprefix("torch."))
    if about:
        text += f" ({', '.join(about)})"
    if d.get("num_examples"):
        text += f" on {_counts(d['num_examples'])} examples"
    return text + "."


def _axis(letter: str, axis: Axis) -> list[str]:
    kind = KINDS.get(axis.kind, _clean(axis.kind))
    seed = "" if axis.seed is None else f" (seed {axis.seed})"
    text = f"{letter}: {kind}{seed}, in {_clean(axis.label)}"
    text += f"; {letter} = 1 is {_number(axis.step)} from the centre"
    normalization = axis.details.get("normalization")
    if normalization and str(normalization) != axis.kind:
        text += f"; normalization: {_clean(normalization)}"
    for key, words in NUMBERS.items():
        if axis.details.get(key) is not None:
            text += f"; {words} {_number(axis.details[key])}"
    found = [text + "."]
    names = [_clean(n) for n in axis.details.get("ignored") or ()]
    count = int(axis.details.get("num_ignored") or len(names))
    if count:
        shown = ", ".join(names[:MOST_NAMES]) + (", ..." if count > MOST_NAMES else "")
        what = "tensor" if count == 1 else "tensors"
        listed = f" ({shown})" if names else ""
        found.append(f"Zero in {letter}'s direction: {count} {what}{listed}.")
    return found


def _grid(s: Slice) -> list[str]:
    spans = [
        f"{letter} from {_number(g.min())} to {_number(g.max())}, {len(g)} points"
        for letter, g in zip("xy", s.grid, strict=False)
        if len(g)
    ]
    total = s.status.size
    counts = {kind: int((s.status == kind).sum()) for kind, _ in COUNTED}
    if counts[Status.MEASURED] == total:
        return [f"Grid: {'; '.join(spans)}: all measured."]
    d = s.details
    parts = []
    for kind, words in COUNTED:
        if not counts[kind]:
            continue
        text = f"{_share(counts[kind], total)} {words}"
        if kind == Status.INTERPOLATED and d.get("tolerance") is not None:
            text += f" within a tolerance of {_number(d['tolerance'])}"
        if kind == Status.CUT and d.get("loss_max") is not None:
            text += f" (the loss is above loss_max = {_number(d['loss_max'])})"
        parts.append(text)
    found = [f"Grid: {'; '.join(spans)}: {', '.join(parts)}."]
    if counts[Status.INTERPOLATED] and d.get("max_check_error") is not None:
        found.append(
            "Largest deviation of the interpolation at points measured to check it:"
            f" {_number(d['max_check_error'])}."
        )
    return found


def _share(count: int, total: int) -> str:
    # Never "0%" of what is there, nor "100%" where something else is too.
    percent = 100 * count / total
    if percent < 1:
        return "less than 1%"
    return f"{min(round(percent), 99)}%" if count < total else "100%"


def _counts(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(
            f"{_clean(name)}: {int(n):,}" if name else f"{int(n):,}" for name, n in value.items()
        )
    return f"{int(value):,}"


def _number(value: Any) -> str:
    if isinstance(value, Mapping):  # one for each value
        known = {n: v for n, v in value.items() if v is not None}
        return ", ".join(
            f"{_number(v)} ({_clean(' '.join(n.rsplit('/', 1)))})" for n, v in known.items()
        )
    return f"{value:.4g}" if isinstance(value, (int, float, np.number)) else _clean(value)


def _short(fingerprint: Any) -> str:
    # As much of a hash as tells data apart; the saved slice has all of it.
    if isinstance(fingerprint, Mapping):
        parts = [f"{_clean(n)} {_short(v)}" for n, v in fingerprint.items()]
        return ", ".join(parts) if len(parts) > 1 else _short(next(iter(fingerprint.values())))
    return _clean(fingerprint)[:8]


def _clean(value: object) -> str:
    # On one line, without what cannot be printed.
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(value).split()))
