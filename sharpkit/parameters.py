"""The space of the parameters: names and shapes on one side, flat vectors on the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeAlias

import torch
from torch import Tensor

from sharpkit.errors import ObjectiveError, ShapeError

__all__ = [
    "Grouping",
    "ParameterSpace",
    "Selection",
    "group_slices",
    "groups",
    "select_names",
    "vector_dtype",
]

Selection: TypeAlias = str | Sequence[str] | Callable[[str], bool]
"""A glob such as ``"blocks.*.attn.*"``, several of them, or a function of the name."""

Grouping: TypeAlias = str | Sequence[str]
"""``"layer"``, ``"parameter"``, a glob, or several globs with one group each."""


def select_names(names: Iterable[str], selection: Selection) -> list[str]:
    """Return the names that a selection picks, in their own order.

    Args:
        names: Parameter names.
        selection: A glob (``*``, ``?``, ``[...]``; ``*`` also matches dots), a sequence
            of globs of which one must match, or a predicate on the name.

    Raises:
        ObjectiveError: If nothing is selected, or a glob of a sequence matches nothing.

    Example:
        >>> select_names(["fc1.weight", "fc1.bias", "fc2.weight"], "fc1.*")
        ['fc1.weight', 'fc1.bias']
        >>> select_names(["fc1.weight", "fc2.weight"], lambda name: "2" in name)
        ['fc2.weight']
    """
    names = list(names)
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    if callable(selection):
        chosen = [name for name in names if selection(name)]
        if not chosen:
            raise ObjectiveError(
                f"Expected `params` to select at least one parameter. The function given"
                f" selects none of the {len(names)}: {shown}."
            )
        return chosen
    globs = [selection] if isinstance(selection, str) else list(selection)
    if not all(isinstance(glob, str) for glob in globs):
        raise ObjectiveError(
            "Expected `params` to be a glob, a sequence of globs or a function of the"
            f" name. Got {selection!r}. Write for example params='layer4.*'."
        )
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            raise ObjectiveError(
                f"Expected params={glob!r} to match a parameter name. It matches none of"
                f" the {len(names)}: {shown}."
            )
    chosen = [n for n in names if any(fnmatchcase(n, glob) for glob in globs)]
    if not chosen:
        raise ObjectiveError(
            f"Expected `params` to select at least one of the {len(names)} parameters."
            " Got an empty selection. Use '*' for all of them."
        )
    return chosen


def vector_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Return the dtype for vectors over parameters of these dtypes: float32 at least.

    Example:
        >>> vector_dtype([torch.bfloat16]), vector_dtype([torch.float32, torch.float64])
        (torch.float32, torch.float64)
    """
    result = torch.float32
    for dtype in dtypes:
        result = torch.promote_types(result, dtype)
    return result


@dataclass(frozen=True)
class ParameterSpace:
    """Names, shapes and order of the parameters that span theta.

    Attributes:
        names: Parameter names, in the order of ``named_parameters()``.
        shapes: Their shapes.
        dtype: The dtype of flat vectors: float32 at least, whatever the model's.
        device: Where flat vectors live.

    Example:
        >>> space = ParameterSpace.of({"w": torch.zeros(2, 3), "b": torch.zeros(2)})
        >>> space.dim
        8
        >>> space.unflatten(torch.arange(8.0))["b"]
        tensor([6., 7.])
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> ParameterSpace:
        """Return the space of these named tensors; at least one is needed."""
        devices = {t.device for t in tensors.values()}
        if len(devices) != 1:
            raise ObjectiveError(
                "Expected all selected parameters on one device. Got"
                f" {sorted(map(str, devices)) or 'no parameters'}. Move the model with"
                " model.to(device)."
            )
        return cls(
            tuple(tensors),
            tuple(t.shape for t in tensors.values()),
            vector_dtype(t.dtype for t in tensors.values()),
            devices.pop(),
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of entries of each parameter."""
        return tuple(shape.numel() for shape in self.shapes)

    @property
    def dim(self) -> int:
        """The number of parameters P."""
        return sum(self.sizes)

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the tensors as one vector ``[P]``; raises ShapeError if one is off."""
        if set(tensors) != set(self.names):
            missing = sorted(set(self.names) - set(tensors))
            extra = sorted(set(tensors) - set(self.names))
            raise ShapeError(
                f"Expected one tensor for each of the {len(self.names)} parameters."
                f" Missing: {missing}; not known: {extra}."
            )
        for name, shape in zip(self.names, self.shapes, strict=True):
            if tensors[name].shape != shape:
                raise ShapeError(
                    f"Expected {name!r} of shape {tuple(shape)}. Got {tuple(tensors[name].shape)}."
                )
        return torch.cat([tensors[n].reshape(-1).to(self.device, self.dtype) for n in self.names])

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """Return views of a vector ``[P]``, one for each parameter."""
        self.check_vector(vector)
        pieces = torch.split(vector, list(self.sizes))
        return {
            name: piece.view(shape)
            for name, piece, shape in zip(self.names, pieces, self.shapes, strict=True)
        }

    def check_vector(self, vector: Tensor) -> None:
        """Raise ShapeError unless the vector has shape ``[P]``."""
        if vector.shape != (self.dim,):
            raise ShapeError(
                f"Expected a vector of shape ({self.dim},), the number of parameters."
                f" Got {tuple(vector.shape)}."
            )


def groups(space: ParameterSpace, by: Grouping = "layer") -> dict[str, list[str]]:
    """Return groups of parameter names.

    Args:
        space: The parameters.
        by: ``"layer"``: by the name before the last dot, which is the module's (``""`` is the
            model itself); ``"parameter"``: one each; a glob or several: one group for each,
            by its own name. These may overlap, and need not cover all parameters.

    Raises:
        ObjectiveError: If a glob matches nothing.

    Example:
        >>> names = ("fc1.weight", "fc1.bias", "fc2.weight")
        >>> shape = torch.Size([2])
        >>> space = ParameterSpace(names, (shape,) * 3, torch.float32, torch.device("cpu"))
        >>> groups(space)
        {'fc1': ['fc1.weight', 'fc1.bias'], 'fc2': ['fc2.weight']}
        >>> groups(space, ["*.weight"])
        {'*.weight': ['fc1.weight', 'fc2.weight']}
    """
    if by == "parameter":
        return {name: [name] for name in space.names}
    if by == "layer":
        found: dict[str, list[str]] = {}
        for name in space.names:
            found.setdefault(name.rpartition(".")[0], []).append(name)
        return found
    globs = [by] if isinstance(by, str) else list(by)
    if not globs or not all(isinstance(glob, str) for glob in globs):
        raise ObjectiveError(
            "Expected `by` to be 'layer', 'parameter', or one or more globs of parameter"
            f" names. Got {by!r}."
        )
    return {glob: select_names(space.names, glob) for glob in globs}


def group_slices(space: ParameterSpace, by: Grouping = "layer") -> dict[str, list[slice]]:
    """Return where the parameters of each group stand in a vector ``[P]``.

    Args:
        space: The parameters.
        by: As for :func:`groups`.

    Raises:
        ObjectiveError: If a glob matches nothing.

    Example:
        >>> names, shape = ("a.weight", "b.weight", "a.bias"), torch.Size([2])
        >>> space = ParameterSpace(names, (shape,) * 3, torch.float32, torch.device("cpu"))
        >>> group_slices(space)["a"]
        [slice(0, 2, None), slice(4, 6, None)]
    """
    where, start = {}, 0
    for name, size in zip(space.names, space.sizes, strict=True):
        where[name] = slice(start, start + size)
        start += size
    return {group: [where[n] for n in names] for group, names in groups(space, by).items()}
