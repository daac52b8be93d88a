"""The network seen layer by layer: linear maps as they act, and sums over paths.

Modules are watched by hooks while they run, and the hooks are gone afterwards; weights are
exchanged, never written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from sharpkit.errors import MeasureError
from sharpkit.objective.evaluator import Evaluator
from sharpkit.objective.losses import CriterionLoss
from sharpkit.objective.products import Named

__all__ = ["LinearLayer", "linear_layers", "path_sum"]

_MAPS = (nn.Linear, _ConvNd)
_HOMOGENEOUS = (
    nn.ReLU, nn.LeakyReLU, nn.RReLU, nn.PReLU, nn.Identity, nn.Flatten, nn.Unflatten,
    nn.modules.dropout._DropoutNd,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.Upsample, nn.PixelShuffle, nn.ChannelShuffle,
)  # fmt: skip
_LOOKUPS = (nn.Embedding, nn.EmbeddingBag)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

HOMOGENEITY = 1e-8  # relative, in float64, by which twice the input may miss twice the output
EXAMPLES = 4  # that the check runs on
_WANTED = (
    "Expected a feed-forward network of linear, convolutional and BatchNorm layers, pooling and"
    " the ReLU family, for which paths multiply weights."
)

Hook = Callable[[str, nn.Module, Any, Any], Any]


@contextlib.contextmanager
def _watched(model: nn.Module, hook: Hook) -> Iterator[None]:
    # Calls hook(name, module, args, output) after each linear map and BatchNorm; what it
    # returns, unless None, is the output.
    handles = []
    try:
        for name, module in model.named_modules():
            if isinstance(module, (*_MAPS, _BatchNorm)):

                def called(m: nn.Module, args: Any, output: Any, name: str = name) -> Any:
                    return hook(name, m, args, output)

                handles.append(module.register_forward_hook(called))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Producers:
    # Which linear map a tensor comes from, unless something was written into it since.
    def __init__(self) -> None:
        self._found: dict[int, tuple[Tensor, int, str, nn.Module]] = {}

    def add(self, output: Tensor, name: str, module: nn.Module) -> None:
        self._found[id(output)] = (output, output._version, name, module)

    def of(self, tensor: Tensor) -> tuple[str, nn.Module] | None:
        tensor_, version, name, module = self._found.get(id(tensor), (None, 0, "", None))
        if tensor_ is not tensor or tensor._version != version or module is None:
            return None
        return (name, module) if tensor.ndim == 2 or isinstance(module, _ConvNd) else None


def _affine(norm: Any) -> tuple[Tensor, Tensor]:
    # BatchNorm with its running statistics: y = scale x + shift.
    if norm.running_mean is None or norm.running_var is None:
        raise MeasureError(
            "Expected BatchNorm with running statistics, which is a linear layer. This one"
            " takes those of the batch."
        )
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -scale * norm.running_mean.double()
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    return scale, shift


def _channels(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(1, -1, *[1] * (like.ndim - 2))


def _first_example(evaluator: Evaluator, work: Callable[[Any], None], *, count: int = 1) -> None:
    # Call work with the first examples of the data, inside the evaluator's surroundings.
    def one(batch: Any) -> None:
        work(evaluator.split(batch, count)[0])

    evaluator.leading().each(one, lambda _: True, grad=True)


# -- linear maps -------------------------------------------------------------------------


@dataclass(frozen=True)
class LinearLayer:
    """The linear map of a layer, without its bias, with a BatchNorm that follows folded in.

    Attributes:
        name: Of the module, or of the parameter.
        matrix: The map where it is a matrix ``[out, in]``, in float64.
        apply: The map where it is a convolution, of tensors ``[1, *in_shape]``.
        in_shape: What it acts on.
        folded: Name of the BatchNorm that is part of it; empty if none is.
    """

    name: str
    matrix: Tensor | None
    apply: Callable[[Tensor], Tensor] | None
    in_shape: tuple[int, ...]
    folded: str = ""

    def transposed(self, u: Tensor) -> Tensor:
        """Return the transposed map of an output-shaped tensor."""
        assert self.apply is not None
        with torch.enable_grad():
            x = torch.zeros(1, *self.in_shape, dtype=u.dtype, device=u.device, requires_grad=True)
            (back,) = torch.autograd.grad(self.apply(x), x, grad_outputs=u)
        return back


def linear_layers(evaluator: Evaluator, theta: Named) -> list[LinearLayer]:
    """Return the linear maps of the layers that run for the first example, in their order.

    Linear and convolutional modules, the latter for the shape of the input that reaches them,
    each once; further parameters of two axes (attention, recurrent cells) as matrices.
    Embeddings, which look up and do not multiply, are left out.

    Raises:
        MeasureError: If there are none.
    """
    double = evaluator.in_double()
    values = {n: t.detach().double() for n, t in theta.items()}
    found: dict[str, LinearLayer] = {}
    producers = _Producers()
    owned: set[int] = set()

    def hook(name: str, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(module, _BatchNorm):
            producer = producers.of(args[0])
            if producer is not None and not found[producer[0]].folded:
                found[producer[0]] = _folded(found[producer[0]], _affine(module)[0], name)
            return
        producers.add(output, name, module)
        if name not in found:
            found[name] = _layer(name, module, args[0])

    def work(batch: Any) -> None:
        with _watched(double.model, hook), torch.no_grad():
            double.loss(values, batch)

    _first_example(double, work)
    modules = dict(double.model.named_modules())
    owned.update(id(p) for name in found for p in modules[name].parameters(recurse=False))
    everything = {**double.fixed, **values}
    for name, p in double.model.named_parameters():
        holder = modules[name.rpartition(".")[0]]
        if p.ndim == 2 and id(p) not in owned and not isinstance(holder, _LOOKUPS):
            matrix = everything[name]
            found[name] = LinearLayer(name, matrix, None, (matrix.shape[1],))
    if not found:
        raise MeasureError(
            "Expected layers that multiply by a matrix or convolve, to take spectral norms of."
            " The network has none: no linear or convolutional module and no matrix."
        )
    return list(found.values())


def _layer(name: str, module: Any, x: Tensor) -> LinearLayer:
    weight = module.weight.detach().clone()
    if isinstance(module, nn.Linear):
        return LinearLayer(name, weight, None, (weight.shape[1],))
    spatial = weight.ndim - 2

    def apply(z: Tensor) -> Tensor:
        if isinstance(module, _ConvTransposeNd):
            function: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[
                spatial - 1
            ]
            transposed: Tensor = function(
                z, weight, None, module.stride, module.padding, module.output_padding,
                module.groups, module.dilation,
            )  # fmt: skip
            return transposed
        result: Tensor = module._conv_forward(z, weight, None)
        return result

    return LinearLayer(name, None, apply, tuple(x.shape[-spatial - 1 :]))


def _folded(layer: LinearLayer, scale: Tensor, name: str) -> LinearLayer:
    scale = scale.detach().clone()
    if layer.matrix is not None:
        return LinearLayer(layer.name, scale[:, None] * layer.matrix, None, layer.in_shape, name)
    inner = layer.apply
    assert inner is not None

    def apply(z: Tensor) -> Tensor:
        y = inner(z)
        return _channels(scale, y) * y

    return LinearLayer(layer.name, None, apply, layer.in_shape, name)


# -- paths -------------------------------------------------------------------------------


def path_sum(evaluator: Evaluator, theta: Named) -> float:
    r"""Return :math:`\sum_{paths} \prod_{e \in path} w_e^2`, from inputs and biases to outputs.

    The network with squared weights is evaluated on an input of ones, in float64. BatchNorm is
    folded into the layer before it. Pooling and other fixed coefficients stay as they are, and
    of a maximum the largest path counts (Jiang et al. 2020). That paths multiply weights is
    verified: modules must be of known kinds, twice the input and the biases must give twice
    the output, and no squared weight may lower an output.

    Raises:
        MeasureError: If one of these does not hold.
    """
    double = evaluator.in_double()
    values = {**double.fixed, **{n: t.detach().double() for n, t in theta.items()}}
    model = double.model
    _refuse_modules(model)
    result: list[float] = []

    def work(batch: Any) -> None:
        x = _input(double, values, batch)
        plain, doubled = (_run(double, values, c * x, _shifts(c), c) for c in (1.0, 2.0))
        gap = float((doubled - 2 * plain).abs().max())
        if not gap <= HOMOGENEITY * float(plain.abs().max()):
            raise MeasureError(
                f"{_WANTED} Doubling the input and the biases of this one does not double its"
                " outputs: look for other activations, products, softmax or constants."
            )
        squares = _squares(model, values)
        leaves = {n: t.requires_grad_() for n, t in squares.items()}
        ones = torch.ones_like(x[:1], requires_grad=True)
        out = _run(double, leaves, ones, _squared_norms(_by_every_name(model, values)), 1.0)
        total = out.sum()
        slopes: list[Tensor] = []
        if total.requires_grad:
            wanted = [ones, *leaves.values()]
            found = torch.autograd.grad(total, wanted, allow_unused=True)
            slopes = [s for s in found if s is not None]
        lowest = min((float(s.min()) for s in slopes), default=0.0)
        if lowest < 0 or float(out.detach().min()) < 0:
            raise MeasureError(
                f"{_WANTED} This one subtracts: a larger squared weight lowers an output."
            )
        result.append(float(total.detach()))

    _first_example(double, work, count=EXAMPLES)
    return result[0]


def _refuse_modules(model: nn.Module) -> None:
    for name, module in model.named_modules():
        kind = type(module).__name__
        own = {n for n, _ in module.named_parameters(recurse=False)}
        weighted = isinstance(module, (*_MAPS, _BatchNorm)) and own <= {"weight", "bias"}
        known = weighted or isinstance(module, (*_HOMOGENEOUS, *_CONTAINERS))
        foreign = type(module).__module__.startswith("torch.nn.") and not known
        if foreign or (own and not known):
            raise MeasureError(f"{_WANTED} This one has {name or 'itself'!r}, of kind {kind}.")


def _input(evaluator: Evaluator, values: Named, batch: Any) -> Tensor:
    # What the network is called with: by the criterion's rules, or by the batch loss.
    calls: list[tuple[Any, Any]] = []

    def called(_: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append((args, kwargs))

    handle = evaluator.model.register_forward_pre_hook(called, with_kwargs=True)
    try:
        with torch.no_grad():
            evaluator.loss(values, batch)
    finally:
        handle.remove()
    tensors = [*calls[0][0], *calls[0][1].values()] if calls else []
    if len(tensors) != 1 or not isinstance(tensors[0], Tensor):
        raise MeasureError(f"{_WANTED} This one is not called with one tensor.")
    if not tensors[0].is_floating_point():
        raise MeasureError(f"{_WANTED} The input of this one is no floating tensor.")
    return tensors[0].detach()


def _run(evaluator: Evaluator, values: Named, x: Tensor, norm: Hook, biases: float) -> Tensor:
    named = dict(values)
    if biases != 1.0:
        for name, module in evaluator.model.named_modules():
            key = f"{name}.bias" if name else "bias"
            if isinstance(module, _MAPS) and key in named:
                named[key] = biases * named[key]
    with _watched(evaluator.model, norm):
        out = evaluator.bound(named, lambda model: CriterionLoss.outputs(model, x))
    if not isinstance(out, Tensor):
        raise MeasureError(f"{_WANTED} This one returns {type(out).__name__}, not a tensor.")
    return out


def _shifts(factor: float) -> Hook:
    # BatchNorm with its shift multiplied.
    def hook(_name: str, module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(module, _BatchNorm):
            return output + (factor - 1) * _channels(_affine(module)[1], output)
        return None

    return hook


def _squares(model: nn.Module, values: Named) -> Named:
    # Squared weights and biases of the linear maps; BatchNorm's are squared when it is folded.
    kept = {
        f"{name}.{part}" if name else part
        for name, module in model.named_modules()
        if isinstance(module, (_BatchNorm, nn.PReLU))
        for part, _ in module.named_parameters(recurse=False)
    }
    return {n: t.clone() if n in kept else t.square() for n, t in values.items()}


def _by_every_name(model: nn.Module, values: Named) -> Named:
    # A tied parameter is among the values by its first name only.
    first: dict[int, str] = {}
    everyone = model.named_parameters(remove_duplicate=False)
    return {n: values[first.setdefault(id(p), n)] for n, p in everyone}


def _squared_norms(values: Named) -> Hook:
    # BatchNorm folded into the map before it: its scale is squared, and so is the joint bias.
    producers = _Producers()

    def hook(name: str, module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(module, _BatchNorm):
            producers.add(output, name, module)
            return None
        (x,) = args
        scale, shift = (t.detach() for t in _affine(module))
        producer = producers.of(x)
        if producer is not None:
            bias = values.get(f"{producer[0]}.bias" if producer[0] else "bias")
            if bias is not None:
                x = x - _channels(bias.square(), x)
                shift = shift + scale * bias
        return _channels(scale.square(), x) * x + _channels(shift.square(), x)

    return hook
