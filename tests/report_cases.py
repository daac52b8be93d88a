"""Studies of known numbers, written through the store, for the tests of reports."""

import contextlib
import math
from pathlib import Path

from sharpkit import measures
from sharpkit.results import Cost, Estimate, Part, Score
from sharpkit.study.identity import Options, Subject
from sharpkit.study.owner import Owner
from sharpkit.study.store import Entry, Store

HOSTILE = (
    "<img src=x onerror=alert(1)>.pt",
    "a\"b'c&amp;.pt",
    "</script><script>window.marker=1</script>.pt",
    "evil\u202etp.exe.pt",
    "line\u2028break\u2029.pt",
    "${data}`+alert(2)+`.pt",
    "a $\\frac{$ formula.pt",
)


def numbers(i):
    """The estimates of model i: every kind of error, a late one, infinite and missing numbers."""
    layers = tuple(
        Part(f"block.{k}.weight", 10.0 ** (k - 1) + i, 0.01, k != 2 or i != 1) for k in range(4)
    )
    ends = tuple(
        Part(f"lambda_{k}", v * (i + 1), 0.002) for k, v in (("1", 8.0), ("2", 3.0), ("-1", -0.5))
    )
    return {
        "hessian_trace": Estimate(
            12.345678 * 2**i,
            0.25,
            "stderr",
            0.5,
            i != 2,
            Cost(24, 1, 0, 0.5),
            layers,
            notes=("Few probes.",) if i == 2 else (),
        ),
        "top_eigenvalues": Estimate(8.0 * (i + 1), 0.002, "bound", parts=ends),
        "sam_sharpness": Estimate(0.5 - 0.04 * i, 0.01, "lower_bound"),
        "parameter_norm": Estimate(3.0 + 0.1 * ((5 * i) % 7), 1e-9, "rounding"),
        "margin": Estimate((math.nan, math.inf, 1.0)[min(i, 2)], None, "stderr"),
    }


def add(
    store,
    name,
    i,
    *,
    metadata=None,
    data="d",
    recipe="recipe.py",
    code="r",
    options=None,
    version="0.1.0",
    fail=(),
    notes=(),
):
    """File a model under a name, with the numbers of model i."""
    options = options or Options()
    entry = Entry(name, recipe, options.text(), options.seed)
    owner = Owner.here()
    subject = Subject(f"w{i}", code, data, "", options.text(), version)
    given = {"gap": 0.1 * i, "family": ("mlp", "cnn")[i % 2]} if metadata is None else metadata
    store.begin(entry, subject, "all", owner, metadata=given)
    origin = {"dtype": "float32", "torch": "2.13", "theta_sha256": f"{i}"}
    for measure, estimate in numbers(i).items():
        failed = measure in fail
        settings = dict(measures.get(measure).settings)
        error = "Expected <b>memory</b>. There was none." if failed else None
        store.record(
            subject.key,
            Score(measure, None if failed else estimate, settings, options.seed, origin, error),
        )
    store.finish(entry, subject.key, owner, notes=notes)


def study(path, count=8, names=None):
    """Write a study of so many models, one of which cannot be loaded, and return its path."""
    with contextlib.closing(Store(path)) as store:
        for i in range(count):
            name = names[i] if names else f"runs/net{i}.pt"
            add(
                store,
                name,
                i,
                fail=("sam_sharpness",) if i == 3 else (),
                notes=("Weights are shared.",) if i == 0 else (),
            )
        entry = Entry("runs/broken.pt", "recipe.py", Options().text(), 0)
        store.fail(
            entry,
            "all",
            "Expected weights. The file holds none.",
            metadata={"gap": 0.3, "family": "cnn"},
        )
    return Path(path)
