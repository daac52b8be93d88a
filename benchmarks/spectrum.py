"""What the numbers of the spectrum cost at equal achieved error, beside the peers.

    python benchmarks/spectrum.py [--quick] [--seeds N] [--models mlp,cnn,vit,minilm]
                                  [--parts hvp,top5,pass] [--json FILE]

Trained networks, one thread, float32, process CPU time. For every seed each method runs
once, in turn, and its time is divided by sharpkit's of the same seed. Building operators and
kept graphs is on the clock. The peers' tolerances are picked before the clock starts: the
loosest that gives every eigenvalue to 1e-3 of the truth on all seeds, and the fewest products
that give the trace the root mean square error that sharpkit's has. Peers run inside the math
kernel of attention, entered from outside here; sharpkit enters it by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import hvp
import numpy as np
import torch
from peers import LIMIT, TooManyError, installed, most_products, renyi
from torch.nn.attention import SDPBackend, sdpa_kernel
from trained import CE, RECIPES, Case, load
from truth import Truth, truth_of

import sharpkit as sk
from sharpkit.estimators import lanczos

ACHIEVE = 1e-3  # relative error of every eigenvalue
DRAWS = 8  # of XTrace and Hutch++ in the search for their products
TIMED = 200  # more products than these of plain Hutchinson are timed as so many and scaled
FLOOR = {"mlp": 1.5}  # arithmetic of one kept product in gradients; 2.0 for the others
SKETCH = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # products of XTrace; 3/2 Hutch++


@dataclass
class Found:
    """What one run of one method gave."""

    products: float = 0.0
    seconds: float = 0.0
    top: Any = None
    bottom: Any = None
    trace: float = math.nan
    stated: float = math.nan  # the trace's standard error, where the method states one
    renyi: float = math.nan
    parts: dict[str, float] = field(default_factory=dict)  # seconds of each call


# -- sharpkit ------------------------------------------------------------------------


def run_sharpkit_pass(objective: sk.Objective, seed: int) -> Found:
    """Run the whole job: both ends, the trace, the density, the Renyi entropy, and more."""
    # The peers give no error from the data, so none is computed here either.
    summary = sk.spectrum(objective, k=5, tol=1e-3, seed=seed, num_groups=0)
    parts = {part.label: part.value for part in summary["top_eigenvalues"].parts}
    trace = summary["hessian_trace"]
    return Found(
        products=summary.cost.hvps,
        top=[parts[f"lambda_{i}"] for i in range(1, 6)],
        bottom=[parts[f"lambda_-{i}"] for i in range(1, 6)],
        trace=trace.value,
        stated=trace.probe_error,
        renyi=renyi(trace.value, summary["frobenius_norm"].value ** 2),
    )


def run_sharpkit_top(objective: sk.Objective, seed: int) -> Found:
    """Compute the five largest eigenvalues."""
    matrix = sk.hessian(objective)
    pairs = lanczos(
        matrix, k=5, which="largest", tol=1e-3, generator=torch.Generator().manual_seed(seed)
    )
    return Found(products=matrix.num_matvecs, top=pairs.largest)


def timed_sharpkit(case: Case, seed: int, run: Callable[[sk.Objective, int], Found]) -> Found:
    """Return a run with its time, which includes building the objective and its graphs."""
    gc.collect()
    start = time.process_time()
    found = run(sk.Objective(case.model, CE, [(case.x, case.y)]), seed)
    found.seconds = time.process_time() - start
    return found


# -- the peers -----------------------------------------------------------------------


@contextlib.contextmanager
def opened(case: Case, kind: type[Any]) -> Any:
    """Give a peer's operator inside the math kernel, with the seconds that building it took."""
    gc.collect()
    with sdpa_kernel(SDPBackend.MATH):
        start = time.process_time()
        peer = kind(case)
        peer.building = time.process_time() - start
        try:
            yield peer
        finally:
            peer.close()


@dataclass
class Pick:
    """What a peer's call is given, and whether that achieves what is asked."""

    knob: Any
    reached: bool
    products: float  # mean over seeds

    def __str__(self) -> str:
        return f"{self.knob}" + ("" if self.reached else " (target missed)")


def pick_eigen(case: Case, truth: Truth, kind: type[Any], end: str, seeds: range) -> Pick | None:
    """Return the knob with the fewest products that achieves 1e-3 on all seeds.

    Each ladder is climbed from its loosest knob to the first that achieves it.
    """
    best: Pick | None = None
    last: Pick | None = None
    for ladder in getattr(kind, f"{end}_ladders"):
        for knob in ladder:
            products, error = [], 0.0
            for seed in seeds:
                with opened(case, kind) as peer:
                    peer.limit = min(LIMIT, 1.2 * best.products) if best else LIMIT
                    try:
                        values = getattr(peer, end)(seed, knob)
                    except TooManyError:
                        error = math.inf
                    else:
                        error = max(error, eigen_error(truth, kind, end, values))
                        products.append(peer.products)
                if error > ACHIEVE:
                    break
            progress(f"{case.name}, {kind.name}, {end}, {knob}: {products}, {error:.1e}")
            if error == math.inf:
                break  # tighter ones take even more
            pick = Pick(knob, error <= ACHIEVE, statistics.mean(products))
            if pick.reached:
                best = pick if best is None or pick.products < best.products else best
                break
            last = pick
    return best or last


def progress(line: str) -> None:
    """Say on standard error how far the search is."""
    print(line, file=sys.stderr, flush=True)


def eigen_error(truth: Truth, kind: type[Any] | None, end: str, values: Any) -> float:
    """Return the worst error of one end; a peer without a smallest end finds magnitudes."""
    if end == "bottom":
        return truth.bottom_error(values)
    if kind is not None and kind.bottom is None:
        return truth.magnitude_error(values)
    return truth.top_error(values)


def pick_trace(case: Case, truth: Truth, kind: type[Any], target: float) -> tuple[str, Pick]:
    """Return the method and the products that achieve the error; plain Hutchinson by its law."""
    needed = max(2, math.ceil((truth.one_probe / target) ** 2))
    method, pick = "hutchinson", Pick(min(needed, LIMIT), needed <= LIMIT, min(needed, LIMIT))
    for other in kind.trace_methods[1:]:
        for size in SKETCH:
            m = size if other == "xtrace" else 3 * size // 2
            if m >= pick.products or m > most_products(other, case.dim):
                break
            total = 0.0
            for seed in range(100, 100 + DRAWS):  # not those that are timed
                with opened(case, kind) as peer:
                    total += (peer.trace(seed, other, m) - truth.trace) ** 2
                if total > DRAWS * target**2:
                    break
            else:
                method, pick = other, Pick(m, True, m)
                break
    progress(f"{case.name}, {kind.name}, trace: {method} {pick.knob}")
    return method, pick


def run_peer_top(case: Case, kind: type[Any], pick: Pick, seed: int) -> Found:
    """Run a peer's call for the largest eigenvalues, building included."""
    with opened(case, kind) as peer:
        start = time.process_time()
        top = peer.top(seed, pick.knob)
        seconds = peer.building + time.process_time() - start
        return Found(products=peer.products, seconds=seconds, top=top)


def run_peer_pass(case: Case, kind: type[Any], plan: dict[str, Any], seed: int) -> Found:
    """Run a peer's separate calls, each timed."""
    found = Found()
    with opened(case, kind) as peer:
        found.parts["build"] = peer.building

        def part(name: str, call: Callable[[], Any], scale: float = 1.0) -> Any:
            before, start = peer.products, time.process_time()
            result = call()
            found.parts[name] = scale * (time.process_time() - start)
            found.products += scale * (peer.products - before)
            peer.products = 0
            return result

        found.top = part("top", lambda: peer.top(seed, plan["top"].knob))
        if plan["bottom"]:
            found.bottom = part("bottom", lambda: peer.bottom(seed, plan["bottom"].knob))
        method, m = plan["method"], plan["trace"].knob
        run = min(m, TIMED) if method == "hutchinson" else m
        found.trace = part("trace", lambda: peer.trace(seed, method, run), m / run)
        square = part("density", lambda: peer.density(seed))
    found.renyi = renyi(found.trace, square)
    found.seconds = sum(found.parts.values())
    return found


# -- the parts -----------------------------------------------------------------------


def spread(values: list[float], digits: int = 2) -> str:
    """Return the median with the lowest and the highest."""
    low, high = min(values), max(values)
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def ratios(runs: list[Found], ours: list[Found]) -> list[float]:
    """Return each seed's time over sharpkit's."""
    return [r.seconds / o.seconds for r, o in zip(runs, ours, strict=True)]


def study_hvp(case: Case, repeats: int) -> dict[str, Any]:
    """Print what one product costs in gradients, and over the arithmetic floor."""
    results = hvp.measure(case.name, case.model, case.x, case.y, repeats)
    floor = FLOOR.get(case.name, 2.0)
    print(f"\nOne product, {case.name}; G = {results['gradient']['seconds']:.3g} s\n")
    print(f"| method | in G | over the floor of {floor} G |\n|---|---|---|")
    for method, r in results.items():
        cells = f"{r['median']:.2f} ({r['low']:.2f}-{r['high']:.2f})"
        print(f"| {method} | {cells} | {r['median'] / floor:.2f} |")
    return results


def study_top(
    case: Case, truth: Truth, tops: dict[type[Any], Pick | None], seeds: range
) -> dict[str, Any]:
    """Print what the five largest eigenvalues cost."""
    picks = {kind: pick for kind, pick in tops.items() if pick}
    runs: dict[str, list[Found]] = {"sharpkit": [], **{k.name: [] for k in picks}}
    for seed in seeds:
        runs["sharpkit"].append(timed_sharpkit(case, seed, run_sharpkit_top))
        for kind, pick in picks.items():
            runs[kind.name].append(run_peer_top(case, kind, pick, seed))
    print(f"\nFive largest eigenvalues to 1e-3, {case.name}\n")
    print("| method | given | products | worst error | CPU s | over sharpkit |")
    print("|---|---|---|---|---|---|")
    by_name = {kind.name: (kind, str(pick)) for kind, pick in picks.items()}
    for name, found in runs.items():
        kind, given = by_name.get(name, (None, "tol 1e-3"))
        error = max(eigen_error(truth, kind, "top", f.top) for f in found)
        print(
            f"| {name} | {given} | {spread([f.products for f in found], 0)} | {error:.1e} |"
            f" {spread([f.seconds for f in found])} | {spread(ratios(found, runs['sharpkit']))} |"
        )
    for kind in tops:
        if kind not in picks:
            print(f"| {kind.name} | no knob ends within {LIMIT} products | - | - | - | - |")
    return {name: [plain(f) for f in found] for name, found in runs.items()}


def study_pass(
    case: Case, truth: Truth, tops: dict[type[Any], Pick | None], seeds: range
) -> dict[str, Any]:
    """Print what the whole job costs: both ends, trace, density, Renyi entropy."""
    tried = [timed_sharpkit(case, seed, run_sharpkit_pass) for seed in seeds]
    target = max(rms([f.trace - truth.trace for f in tried]), rms([f.stated for f in tried]))
    plans: dict[type[Any], dict[str, Any]] = {}
    for kind, top in tops.items():
        if top is None:
            print(f"note: {kind.name} has no knob that ends within {LIMIT} products")
            continue
        bottom = pick_eigen(case, truth, kind, "bottom", seeds)
        method, trace = pick_trace(case, truth, kind, target)
        plans[kind] = {"top": top, "bottom": bottom, "method": method, "trace": trace}
    runs: dict[str, list[Found]] = {"sharpkit": [], **{k.name: [] for k in plans}}
    for seed in seeds:
        runs["sharpkit"].append(timed_sharpkit(case, seed, run_sharpkit_pass))
        for kind, plan in plans.items():
            runs[kind.name].append(run_peer_pass(case, kind, plan, seed))
    best = best_peer(plans, runs)
    if best:
        runs["best peer of each part"] = best
    print_pass(case, truth, target, plans, runs)
    return {name: [plain(f) for f in found] for name, found in runs.items()}


def best_peer(plans: dict[type[Any], Any], runs: dict[str, list[Found]]) -> list[Found]:
    """Return the sums of the cheapest call that reached its target for each part."""
    chosen: dict[str, str] = {}
    for part in ("top", "bottom", "trace", "density"):
        able = [
            kind.name
            for kind, plan in plans.items()
            if part == "density" or (plan[part] is not None and plan[part].reached)
        ]
        if part == "trace" and not able:  # none does: the one that gets nearest, "at least"
            able = [kind.name for kind in plans]
        if not able:
            print(f"note: no peer reaches the target of part {part!r}: it is left out")
            continue
        chosen[part] = min(
            able, key=lambda n, part=part: statistics.median(f.parts[part] for f in runs[n])
        )
    found = []
    for i in range(len(runs["sharpkit"])):
        parts = {f"{part} by {name}": runs[name][i].parts[part] for part, name in chosen.items()}
        parts |= {f"build {name}": runs[name][i].parts["build"] for name in set(chosen.values())}
        found.append(Found(seconds=sum(parts.values()), parts=parts))
    return found if chosen else []


def print_pass(
    case: Case,
    truth: Truth,
    target: float,
    plans: dict[type[Any], Any],
    runs: dict[str, list[Found]],
) -> None:
    """Print the table of the whole job."""
    true_renyi = renyi(truth.trace, truth.square)
    print(f"\nWhole job, {case.name}: both ends, trace, density, Renyi entropy\n")
    print(
        f"true trace {truth.trace:.4g}, known to {truth.trace_error / truth.trace:.2%};"
        f" asked of the peers: {target / truth.trace:.2%}; Renyi entropy {true_renyi:.3f}\n"
    )
    print(
        "| method | products | error top | error bottom | trace rms (own) | Renyi rms |"
        " CPU s | over sharpkit |"
    )
    print("|---|---|---|---|---|---|---|---|")
    kinds = {kind.name: kind for kind in plans}
    for name, found in runs.items():
        times = f"{spread([f.seconds for f in found])} | {spread(ratios(found, runs['sharpkit']))}"
        if found[0].top is None:
            print(f"| {name} | - | - | - | - | - | {times} |")
            continue
        kind = kinds.get(name)
        top = max(eigen_error(truth, kind, "top", f.top) for f in found)
        bottom = "-"
        if found[0].bottom is not None:
            bottom = f"{max(truth.bottom_error(f.bottom) for f in found):.1e}"
        # What was timed with fewer probes and scaled has their error, scaled.
        shrink = 1.0
        if kind and plans[kind]["method"] == "hutchinson":
            shrink = math.sqrt(min(TIMED, plans[kind]["trace"].knob) / plans[kind]["trace"].knob)
        error = shrink * rms([f.trace - truth.trace for f in found]) / abs(truth.trace)
        own = rms([f.stated for f in found]) / abs(truth.trace)
        stated = "" if math.isnan(own) else f" ({own:.1%})"
        entropy = rms([f.renyi - true_renyi for f in found])
        print(
            f"| {name} | {spread([f.products for f in found], 0)} | {top:.1e} | {bottom} |"
            f" {error:.1%}{stated} | {entropy:.3f} | {times} |"
        )
    for kind, plan in plans.items():
        least = "" if plan["trace"].reached else f", at least (the target needs more than {LIMIT})"
        bottom = plan["bottom"] or "no such call"
        seconds = {
            part: f"{statistics.median(f.parts[part] for f in runs[kind.name]):.2f} s"
            for part in runs[kind.name][0].parts
        }
        print(
            f"\n{kind.name}: top {plan['top']}, bottom {bottom},"
            f" trace {plan['method']} {plan['trace'].knob}{least}; {seconds}"
        )
    if "best peer of each part" in runs:
        print(f"\nbest peer of each part: {', '.join(runs['best peer of each part'][0].parts)}")


def rms(values: list[float]) -> float:
    """Return the root of the mean square."""
    return math.sqrt(statistics.mean(v * v for v in values))


def plain(found: Found) -> dict[str, Any]:
    """Return a run as plain data for JSON."""
    data = asdict(found)
    return {k: np.asarray(v).tolist() if k in ("top", "bottom") else v for k, v in data.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two seeds, the MLP and the CNN")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--models", help=f"of {', '.join(RECIPES)}")
    parser.add_argument("--parts", default="hvp,top5,pass")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the peers' own
    seeds = range(options.seeds or (2 if options.quick else 5))
    names = (options.models or ("mlp,cnn" if options.quick else ",".join(RECIPES))).split(",")
    parts, kinds = options.parts.split(","), installed()
    print(f"sharpkit measured: {Path(sk.__file__).parent}")  # several checkouts may be about
    results: dict[str, Any] = {}
    for name in names:
        case = load(name)
        truth = truth_of(case)
        print(
            f"\n## {name}: {case.dim:,} parameters, {len(case.x)} examples, loss {case.loss:.3g}"
            f"; eigenvalues known to {truth.eigen_gap:.0e}",
            flush=True,
        )
        results[name] = {"dim": case.dim, "loss": case.loss, "truth": plain_truth(truth)}
        if "hvp" in parts:
            results[name]["hvp"] = study_hvp(case, 3 * len(seeds))
        if "top5" in parts or "pass" in parts:
            tops = {kind: pick_eigen(case, truth, kind, "top", seeds) for kind in kinds}
        if "top5" in parts:
            results[name]["top5"] = study_top(case, truth, tops, seeds)
        if "pass" in parts:
            results[name]["pass"] = study_pass(case, truth, tops, seeds)
        if options.json:  # after every network: a long run may be cut short
            options.json.write_text(json.dumps(results, indent=1))


def plain_truth(truth: Truth) -> dict[str, Any]:
    """Return the truth as plain data for JSON."""
    return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in vars(truth).items()}


if __name__ == "__main__":
    main()
