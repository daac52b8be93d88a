"""The recipe of the demo's checkpoints, for ``sharpkit score`` and ``sharpkit doctor``.

Copied beside the checkpoints, so that they can be scored again with any measure:
``sharpkit score sharpkit-demo/checkpoints --recipe sharpkit-demo/recipe.py``.
"""

from pathlib import Path
from typing import Any

from torch import Tensor, nn, split

from sharpkit.demo.zoo import build, digits, read_spec

loss = nn.CrossEntropyLoss()


def model(checkpoint: Path) -> nn.Module:
    """Return the network that the checkpoint belongs to; sharpkit loads the weights."""
    return build(read_spec(checkpoint)[0])


def data() -> list[tuple[Tensor, Tensor]]:
    """Return the training images in batches of 300."""
    images = digits()
    return list(zip(split(images.train_images, 300), split(images.train_labels, 300), strict=True))


def metadata(checkpoint: Path) -> dict[str, Any]:
    """Return the gap and the hyper-parameters that were saved beside the checkpoint."""
    return read_spec(checkpoint)[1]
