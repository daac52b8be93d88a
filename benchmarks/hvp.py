"""What one Hessian-vector product costs, in gradients of the same batch, beside the peers.

    python benchmarks/hvp.py [--quick] [--repeats N] [--models mlp,cnn,...] [--json FILE]

One thread, float32, process CPU time. In every repeat each method runs once, in turn, with
the plain gradient (forward and backward by torch.autograd.grad, nothing of sharpkit) among
them; a cost is the median over repeats of its time over the gradient's time in the same
repeat. "K=8" applies eight vectors at once and counts one column. Kept graphs and PyHessian's
single-batch mode are built before the clock starts, as they are in use. Peers that have no
second derivative of fused attention run inside the math kernel, entered from outside here;
sharpkit enters it by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from models import MODELS
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import sharpkit as sk

Run = Callable[[], Any]
CE = nn.CrossEntropyLoss()


def methods(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, tuple[Run, int]]:
    """Return each method with the number of columns that one run does."""
    parameters = list(model.parameters())
    dim = sum(p.numel() for p in parameters)
    v, V8 = torch.randn(dim), torch.randn(dim, 8)

    def gradient() -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return torch.autograd.grad(CE(model(x), y), parameters)

    kept = sk.Objective(model, CE, [(x, y)], hvp_mode="kept")
    streamed = sk.Objective(model, CE, [(x, y)], hvp_mode="streamed")
    kept.hvp(v)
    found: dict[str, tuple[Run, int]] = {
        "gradient": (gradient, 1),
        "sharpkit kept": (lambda: kept.hvp(v), 1),
        "sharpkit streamed": (lambda: streamed.hvp(v), 1),
        "sharpkit streamed K=8": (lambda: streamed.hvp(V8), 8),
    }
    for add in (_pyhessian, _curvlinops, _eigenthings):
        with contextlib.suppress(ImportError):
            found.update(add(model, x, y, v, V8))
    return found


def _under_math(function: Run) -> Run:
    def run() -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return function()

    return run


def _pyhessian(model: nn.Module, x: Tensor, y: Tensor, v: Tensor, V8: Tensor) -> Any:
    from pyhessian import hessian
    from pyhessian.utils import hessian_vector_product

    del V8
    model.zero_grad(set_to_none=True)
    shapes = [p.shape for p in model.parameters()]
    vs = [t.view(s) for t, s in zip(v.split([s.numel() for s in shapes]), shapes, strict=True)]
    with sdpa_kernel(SDPBackend.MATH):
        single = hessian(model, CE, data=(x, y), cuda=False)
    model.zero_grad(set_to_none=True)
    loader = hessian(model, CE, dataloader=[(x, y)], cuda=False)
    return {
        "PyHessian data=": (
            _under_math(lambda: hessian_vector_product(single.gradsH, single.params, vs)), 1,
        ),
        "PyHessian loader": (_under_math(lambda: loader.dataloader_hv_product(vs)), 1),
    }  # fmt: skip


def _curvlinops(model: nn.Module, x: Tensor, y: Tensor, v: Tensor, V8: Tensor) -> Any:
    from curvlinops import HessianLinearOperator

    operator = HessianLinearOperator(
        model, CE, list(model.parameters()), [(x, y)], check_deterministic=False
    )
    return {
        "curvlinops": (_under_math(lambda: operator @ v), 1),
        "curvlinops K=8": (_under_math(lambda: operator @ V8), 8),
    }


def _eigenthings(model: nn.Module, x: Tensor, y: Tensor, v: Tensor, V8: Tensor) -> Any:
    from hessian_eigenthings.operators import HessianOperator

    del V8
    operator = HessianOperator(model, [(x, y)], lambda m, b: CE(m(b[0]), b[1]))
    return {"hessian-eigenthings": (_under_math(lambda: operator.matvec(v)), 1)}


def untrained(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a network at its start, with random inputs and labels."""
    torch.manual_seed(0)
    model, x = MODELS[name]()
    return model.eval(), x, torch.randint(10, (len(x),))


def measure(
    name: str, model: nn.Module, x: Tensor, y: Tensor, repeats: int
) -> dict[str, dict[str, float]]:
    """Return the median, the lowest and the highest cost of each method, in gradients."""
    runs = methods(model, x, y)
    agree(name, runs)
    times: dict[str, list[float]] = {method: [] for method in runs}
    for _ in range(repeats):
        for method, (run, _columns) in runs.items():
            start = time.process_time()
            run()
            times[method].append(time.process_time() - start)
    result = {}
    for method, (_run, columns) in runs.items():
        costs = [t / columns / g for t, g in zip(times[method], times["gradient"], strict=True)]
        result[method] = {
            "median": statistics.median(costs),
            "low": min(costs),
            "high": max(costs),
            "seconds": statistics.median(times[method]) / columns,
        }
    return result


def agree(name: str, runs: dict[str, tuple[Run, int]]) -> None:
    """Warm up; assert that sharpkit's products agree, and say whose differ from them."""
    products = {}
    for method, (run, columns) in runs.items():
        product = run()
        if isinstance(product, Tensor) and columns == 1 and method != "gradient":
            products[method] = product.detach()
    expected = products["sharpkit kept"]
    for method, product in products.items():
        gap = float((product - expected).norm() / expected.norm())
        assert gap < 1e-4 or not method.startswith("sharpkit"), f"{method}: {gap:.1e}"
        if gap >= 1e-4:
            print(f"note: on {name} the product of {method} differs by {gap:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three repeats")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the peers' own
    names = options.models.split(",")
    repeats = 3 if options.quick else options.repeats
    results = {name: measure(name, *untrained(name), repeats) for name in names}
    order = list(dict.fromkeys(method for r in results.values() for method in r))
    print("| method | " + " | ".join(names) + " |")
    print("|---|" + "---|" * len(names))
    for method in order:
        cells = []
        for name in names:
            r = results[name].get(method)
            cells.append(f"{r['median']:.2f} ({r['low']:.2f}-{r['high']:.2f})" if r else "-")
        print(f"| {method} | " + " | ".join(cells) + " |")
    print("gradient: " + ", ".join(f"{n} {results[n]['gradient']['seconds']:.3g} s" for n in names))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
