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
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import sharpkit as sk

Run = Callable[[], Any]
CE = nn.CrossEntropyLoss()


class Residual(nn.Module):
    def __init__(self, width: int, stride: int):
        super().__init__()
        out = width * stride
        self.body = nn.Sequential(
            nn.Conv2d(width, out, 3, stride, 1), nn.BatchNorm2d(out), nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1), nn.BatchNorm2d(out),
        )  # fmt: skip
        self.skip = nn.Conv2d(width, out, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.skip(x))


class Transformer(nn.Module):
    """Pre-norm encoder over patches (ViT) or tokens (BERT-like), mean pooling."""

    def __init__(self, embed: nn.Module, width: int, depth: int, length: int, heads: int):
        super().__init__()
        self.embed = embed
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True,
            norm_first=True,
        )  # fmt: skip
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(x) + self.position).mean(dim=1))


def mlp() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(),
        nn.Linear(512, 10),
    )  # fmt: skip
    return model, torch.randn(512, 784)


def cnn() -> tuple[nn.Module, Tensor]:
    layers: list[nn.Module] = []
    for a, b in ((3, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(a, b, 3, 1, 1), nn.ReLU(), nn.AvgPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 10)), torch.randn(64, 3, 32, 32)


def resnet() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU(), Residual(16, 1),
        Residual(16, 2), Residual(32, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(64, 10),
    )  # fmt: skip
    return model, torch.randn(32, 3, 32, 32)


def vit() -> tuple[nn.Module, Tensor]:
    embed = nn.Sequential(nn.Conv2d(3, 96, 4, 4), nn.Flatten(2))

    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = embed

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).transpose(1, 2)

    return Transformer(Patches(), 96, 4, 64, 4), torch.randn(16, 3, 32, 32)


def bert() -> tuple[nn.Module, Tensor]:
    return Transformer(nn.Embedding(1000, 128), 128, 4, 64, 4), torch.randint(1000, (16, 64))


MODELS = {"mlp": mlp, "cnn": cnn, "resnet": resnet, "vit": vit, "bert": bert}


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


def measure(name: str, repeats: int) -> dict[str, dict[str, float]]:
    """Return the median, the lowest and the highest cost of each method, in gradients."""
    torch.manual_seed(0)
    model, x = MODELS[name]()
    model.eval()
    y = torch.randint(10, (len(x),))
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
    results = {name: measure(name, 3 if options.quick else options.repeats) for name in names}
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
