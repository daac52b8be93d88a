"""Layers and their neurons, whose weights are rows of the layer's matrix."""

from __future__ import annotations

from fnmatch import fnmatchcase

from torch import Tensor, nn

from sharpkit.analysis import Analysis
from sharpkit.errors import SettingsError

TRANSPOSED = ("Conv1D",)  # of transformers: a linear layer that holds (in, out)
ALIKE = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def chosen_layers(analysis: Analysis, layer: str | None) -> dict[str, Analysis]:
    """Return the analyses of the layers that a glob matches; None: of the last layer.

    Raises:
        SettingsError: If it matches no weight.
    """
    layers = analysis.layers()
    if layer is None:
        last = list(layers)[-1]
        return {last: layers[last]}
    found = {name: part for name, part in layers.items() if fnmatchcase(name, layer)}
    if not found:
        raise SettingsError(
            f"Expected `layer` to match a weight: {', '.join(list(layers)[:8])}"
            f"{', ...' if len(layers) > 8 else ''}. Got {layer!r}. Use '*' for all."
        )
    return found


def neurons(layer: Analysis) -> tuple[Tensor, int]:
    """Return a layer's weight and the axis of its neurons; a vector is one neuron's."""
    (name,), (shape,) = layer.objective.space.names, layer.objective.space.shapes
    weight = layer.theta.reshape(shape)
    if weight.ndim < 2:
        return weight.reshape(1, -1), 0
    module = dict(layer.objective.model.named_modules()).get(name.rpartition(".")[0])
    turned = isinstance(module, ALIKE) or type(module).__name__ in TRANSPOSED
    return weight, 1 if turned and name.endswith("weight") else 0
