"""One of three gloo processes: measures with the others, and with one of them alone."""

import datetime
import sys
import time
import warnings

import torch
import torch.distributed as dist
from cases import CASES, CE, Case, X, Y, mlp, normal, seeded
from torch import nn

import sharpkit as sk
from sharpkit.estimators import basis, lanczos
from sharpkit.estimators.krylov import Krylov

# The sizes of all batches, and the numbers of those that each rank has: a short last batch on
# rank 0, one example on rank 1, nothing on rank 2. In order they are the first of each rank,
# the second of each, and so on.
LAYOUTS = {2: ((5, 1, 3, 2), ([0, 2], [1, 3])), 3: ((6, 1, 4), ([0, 2], [1], []))}
F64 = torch.float64
AS_IT_IS = basis.SHARED


def convolution():
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)
    )
    net[1].running_mean.copy_(torch.tensor([0.1, -0.2]))
    net[1].running_var.copy_(torch.tensor([0.5, 2.0]))
    return net


IMAGES = Case("convolution", convolution, CE, normal(11, 1, 4, 4), Y, nn.functional.cross_entropy)
ALL = {case.name: case for case in [*CASES, IMAGES]}
PRODUCTS = ("hvp", "ggnvp", "fisher_vp", "mc_fisher_vp")
WIDE = 20  # hidden units of the network whose Krylov basis is shared out
MEASURED = {
    2: ["masked tokens"],
    3: ["mlp, cross-entropy", "convolution", "attention, encoder", "masked tokens"],
}
SCORED = "mlp, cross-entropy"
SLOWLY_SCORED = ["convolution", "attention, encoder", "masked tokens"]
GROUPS = {3: "world"}  # of two, once it is made


def objective(case, size, rank=None, **options):
    """A case on all data, or on a rank's own."""
    sizes, owned = LAYOUTS[size]
    batches = case.batches(*sizes)
    if rank is not None:
        batches = [batches[i] for i in owned[rank]]
        options = {"process_group": GROUPS[size], **options}
    return sk.Objective(case.model(), case.criterion, batches, case.params, **options)


def vectors(objective, columns=4):
    return normal(objective.space.dim, columns, seed=9)


def readings(objective):
    """All that an objective says of its data, and the all-reduces of each product."""
    V, team = vectors(objective), objective.team
    found = {
        "value": objective.value(),
        "gradient": objective.gradient(),
        "moved": objective.at(1.1 * objective.theta).value(),
        "restricted": objective.restrict(lambda name: "weight" in name).gradient(),
        "fingerprint": objective.data_fingerprint,
        "counts": (objective.num_examples, objective.num_terms),
        "repr": repr(objective),
        "ggn_diagonal": objective.ggn_diagonal(),
        "fisher_diagonal": objective.fisher_diagonal(),
        "per_example_gradients": objective.per_example_gradients(),
        "slopes": torch.stack(objective.example_slopes(V[:, 0])),
        "grouped_value": torch.stack(objective.grouped_value(4)),
        "grouped_forms": objective.grouped_forms(V, [V], num_groups=4).forms,
        "grouped_ggn": objective.grouped_forms(V, [V], num_groups=3, matrix="ggn").forms,
    }
    sums = {}
    for name in PRODUCTS:
        product = getattr(objective, name)
        product(V[:, :1])  # what is found out once
        before = team.num_sums
        found[name] = product(V)
        sums[name] = team.num_sums - before
        found[f"{name} of a vector"] = product(V[:, 0])
    before = team.num_sums
    found["monte carlo, again"] = objective.mc_fisher_vp(V, num_samples=2, seed=3)
    sums["gradient"] = -team.num_sums
    objective.gradient()
    sums["gradient"] += team.num_sums
    groups = []
    objective.each_group_gradient(2, lambda g, n: groups.append(n * g))
    found["group_gradients"] = torch.stack(groups)
    if objective.has_labels and objective.criterion is not None:
        try:
            margins, examples = objective.margins()
            found["margins"], found["examples"] = margins, examples.double()
            value, slope, errors = objective.weakest_margins(4)
            found["weakest"] = torch.cat([slope, torch.tensor([value, errors], dtype=F64)])
        except sk.errors.MeasureError as error:
            found["margins"] = str(error)
    for size in (3, None):
        for i, shard in enumerate(objective.shards(size)):
            found[f"shard {size} {i}"] = torch.cat([shard.value()[None], shard.gradient()])
            found[f"shard {size} {i} data"] = shard.data_fingerprint
    return found, sums


def ways(case, size, rank=None):
    """Products by every way that is not the default."""
    found = {}
    for mode in ("kept", "streamed", "forward_over_reverse", "central_difference"):
        made = objective(case, size, rank, hvp_mode=mode)
        found[mode] = made.hvp(vectors(made, 2))
        assert mode in made.hvp_mode
    made = objective(case, size, rank, memory_budget=0)
    found["no memory"] = made.hvp(vectors(made, 2))
    return found


def batch_loss(model, batch):
    x, y = batch["x"], batch["y"]
    keep = y >= 0
    return nn.functional.cross_entropy(model(x)[keep], y[keep], reduction="sum"), int(keep.sum())


def from_batch_loss(size, rank=None):
    sizes, owned = LAYOUTS[size]
    y = Y.clone()
    y[1::3] = -1
    batches = [{"x": a, "y": b} for a, b in zip(X.split(sizes), y.split(sizes), strict=True)]
    options = {}
    if rank is not None:
        batches, options = [batches[i] for i in owned[rank]], {"process_group": GROUPS[size]}
    made = sk.Objective.from_batch_loss(seeded(mlp), batch_loss, batches, **options)
    V = vectors(made)
    return {
        "value": made.value(),
        "gradient": made.gradient(),
        "hvp": made.hvp(V),
        "fisher": made.fisher_vp(V),
    }


def eigenpairs(matrix, **options):
    found = lanczos(matrix, k=1, tol=1e-4, generator=torch.Generator().manual_seed(0), **options)
    values = torch.tensor([*found.largest, *found.smallest], dtype=F64)
    return {"values": values, "vectors": found.largest_vectors.abs()}


def wide_network():
    return nn.Sequential(nn.Linear(4, WIDE), nn.Tanh(), nn.Linear(WIDE, 3))


def wide(size, rank=None):
    case = Case("wide", wide_network, CE, X, Y, nn.functional.cross_entropy)
    return sk.hessian(objective(case, size, rank))


def krylov_bytes(matrix, steps=5):
    run = Krylov(matrix, torch.Generator().manual_seed(0))
    for _ in range(steps):
        run.step()
    held = sum(chunk.untyped_storage().nbytes() for chunk in run.basis._chunks)
    return held, torch.as_tensor(run.ritz()[0])


def scores(case, size, rank=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sk.SharpkitWarning)
        found = sk.score(objective(case, size, rank), seed=3)
    return [score.to_dict() for score in found]


# -- what goes wrong -----------------------------------------------------------------------


class Moody:
    """A batch loss that fails on one rank, when told to."""

    def __init__(self, rank):
        self.rank, self.failure = rank, None

    def __call__(self, model, batch):
        if self.rank == 1 and self.failure is not None:
            raise self.failure
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum"), len(
            batch[1]
        )


class Changing:
    """Data that differ between two passes."""

    def __init__(self, batches, changes):
        self.batches, self.changes, self.passes = batches, changes, 0

    def __iter__(self):
        self.passes += 1
        shift = self.passes * self.changes
        return iter([(x + shift, y) for x, y in self.batches])


def attempt(work):
    start = time.perf_counter()
    try:
        work()
        said = ""
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    return said, time.perf_counter() - start


def failures(size, rank):
    """What each rank raises, and after how long."""
    case, loss = ALL["mlp, cross-entropy"], Moody(rank)
    sizes, owned = LAYOUTS[size]
    batches = [case.batches(*sizes)[i] for i in owned[rank]]
    world = {"process_group": "world"}

    def make(model=None, data=batches, **options):
        return sk.Objective(model or case.model(), CE, data, **{**world, **options})

    made = sk.Objective.from_batch_loss(case.model(), loss, batches, **world)
    v = vectors(made, 1)
    before = made.hvp(v)
    found = {}
    loss.failure = ValueError("no luck")
    for name, work in {
        "value": made.value,
        "gradient": made.gradient,
        "hvp": lambda: made.at(made.theta).hvp(v),
        "groups": lambda: made.grouped_value(4),
        "construction": lambda: sk.Objective.from_batch_loss(case.model(), loss, batches, **world),
    }.items():
        found[name] = attempt(work)
    loss.failure = None
    found["goes on"] = attempt(lambda: torch.testing.assert_close(made.hvp(v), before))
    bad = [(x * float("nan"), y) for x, y in batches] if rank == 1 else batches
    found["not finite"] = attempt(lambda: make(data=bad))
    found["changing"] = attempt(lambda: make(data=Changing(batches, rank == 1)))
    moved = case.model()
    if rank == 1:
        moved[2].bias.data[1] += 1e-12
    found["parameters"] = attempt(lambda: make(moved))
    found["settings"] = attempt(lambda: make(params="0.*" if rank == 1 else "2.*"))
    found["other data for probes"] = attempt(lambda: make(share="probes"))
    found["no terms"] = attempt(lambda: make(data=[(x, y - y - 100) for x, y in batches]))
    unsendable = (lambda: 0) if rank == 1 else 0
    found["unsendable"] = attempt(lambda: made.team.gather(lambda: unsendable))
    torn = made.at(made.theta)
    found["vectors"] = attempt(lambda: torn.hvp(v + rank * 1e-15 * torch.ones_like(v)))
    found["afterwards"] = attempt(lambda: made.value())
    one, two = make(), make()
    found["other objectives"] = attempt(lambda: (two if rank == 1 else one).value())
    same = make()
    try:
        same.hvp(normal(3))
    except sk.errors.ShapeError as error:
        found["alike"] = (str(error), 0.0)
    found["margins"] = attempt(made_without_labels(case, batches).margins)
    return found


def made_without_labels(case, batches):
    targets = [(x, normal(len(x), 3)) for x, _ in batches]
    return sk.Objective(case.model(), nn.MSELoss(), targets, process_group="world")


def probes(size, rank=None):
    """Columns of blocks shared out, on data that all ranks have."""
    case = ALL["mlp, cross-entropy"]
    options = {} if rank is None else {"process_group": GROUPS[size], "share": "probes"}
    made = sk.Objective(case.model(), case.criterion, case.batches(*LAYOUTS[size][0]), **options)
    V = vectors(made, 5)
    found = {name: getattr(made, name)(V) for name in PRODUCTS}
    found |= {f"{name} of a vector": getattr(made, name)(V[:, 0]) for name in PRODUCTS}
    found["gradient"] = made.gradient()
    found["fingerprint"] = made.data_fingerprint
    requests = ["hessian_trace", "hessian_diagonal_norm", "top_eigenvalues:k=2"]
    requests = [r for r in requests if r.partition(":")[0] in sk.measures.names()]
    found["scores"] = torch.tensor([s.estimate.value for s in sk.score(made, requests)], dtype=F64)
    return found


def untouched(case, size, rank):
    """Whether measuring left the user's model as it was."""
    model = case.model()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    batches = [case.batches(*LAYOUTS[size][0])[i] for i in LAYOUTS[size][1][rank]]
    state = torch.get_rng_state()
    made = sk.Objective(model, case.criterion, batches, process_group="world")
    made.hvp(vectors(made))
    same = all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    return same and torch.equal(state, torch.get_rng_state()) and model[0].weight.grad is None


def measured(size, rank):
    """The part that default tests look at."""
    found = {name: readings(objective(ALL[name], size, rank)) for name in MEASURED[size]}
    basis.SHARED = 1
    found["sharded eigenpairs"] = eigenpairs(wide(size, rank))
    found["krylov"] = krylov_bytes(wide(size, rank))
    if size == 2:
        found["probes"] = probes(size, rank)
        found["scores"] = {SCORED: scores(ALL[SCORED], size, rank)}  # their bases are shared out
        basis.SHARED = AS_IT_IS
        return found
    found["sharded restarts"] = eigenpairs(wide(size, rank), max_basis=20)
    found["sharded blocks"] = eigenpairs(wide(size, rank), block_size=2)
    basis.SHARED = AS_IT_IS
    found["eigenpairs"] = eigenpairs(wide(size, rank))
    found["ways"] = ways(ALL["mlp, cross-entropy"], size, rank)
    found["batch loss"] = from_batch_loss(size, rank)
    found["untouched"] = untouched(ALL["convolution"], size, rank)
    found["failures"] = failures(size, rank)
    return found


def slowly_measured(size, rank):
    """The part that takes long."""
    found = {name: readings(objective(ALL[name], size, rank)) for name in ALL}
    found["scores"] = {name: scores(ALL[name], size, rank) for name in SLOWLY_SCORED}
    return found


def main():
    rank, store, out, slow = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4] == "slow"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=3,
        timeout=datetime.timedelta(seconds=400),
    )
    GROUPS[2] = dist.new_group([0, 1])
    work = slowly_measured if slow else measured
    found = {size: work(size, rank) for size in (3, 2) if rank < size}
    torch.save(found, f"{out}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
