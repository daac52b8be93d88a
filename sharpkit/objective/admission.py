"""What is refused before anything is evaluated, with what to do instead."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import nn

from sharpkit.errors import ObjectiveError
from sharpkit.parameters import Selection, select_names

__all__ = ["HvpMode", "refuse_training_mode", "trainable", "validate"]

HvpMode: TypeAlias = Literal[
    "auto", "kept", "streamed", "forward_over_reverse", "central_difference"
]


EVALUATION_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def validate(
    model: Any, dtype: torch.dtype | None, hvp_mode: str, memory_budget: int | None
) -> None:
    """Raise ObjectiveError for arguments of the wrong kind."""
    if not isinstance(model, nn.Module):
        raise ObjectiveError(
            f"Expected `model` to be a torch.nn.Module. Got {type(model).__name__}. For a"
            " checkpoint file build the model first and load the weights into it."
        )
    if dtype is not None and dtype not in EVALUATION_DTYPES:
        raise ObjectiveError(
            "Expected `dtype` to be torch.float32 or torch.float64 (or torch.bfloat16), in"
            f" which second derivatives have the range they need. Got {dtype}."
        )
    if hvp_mode not in get_args(HvpMode):
        raise ObjectiveError(
            f"Expected `hvp_mode` to be one of {', '.join(get_args(HvpMode))}. Got {hvp_mode!r}."
        )
    if memory_budget is not None and memory_budget < 0:
        raise ObjectiveError(
            f"Expected `memory_budget` to be a number of bytes, at least 0. Got {memory_budget}."
        )


def trainable(model: nn.Module, params: Selection, evaluated_in: torch.dtype | None) -> list[str]:
    """Return the names of the selected parameters that are not frozen."""
    parameters = dict(model.named_parameters())
    if not parameters:
        raise ObjectiveError(f"Expected a model with parameters. {type(model).__name__} has none.")
    lazy = [n for n, p in parameters.items() if isinstance(p, nn.UninitializedParameter)]
    if lazy:
        raise ObjectiveError(
            f"Expected initialised parameters. {lazy[0]!r} is lazy. Run the model once on"
            " a batch before."
        )
    chosen = select_names(parameters, params)
    names = [n for n in chosen if parameters[n].requires_grad]
    if not names:
        raise ObjectiveError(
            f"Expected trainable parameters. All {len(chosen)} selected ones are frozen"
            " (requires_grad=False). Call requires_grad_(True) on those to measure."
        )
    for name in names:
        dtype = parameters[name].dtype
        if not dtype.is_floating_point:
            raise ObjectiveError(
                f"Expected real parameters. {name!r} is {dtype}. Leave it out with params=..."
            )
        if dtype not in EVALUATION_DTYPES and evaluated_in is None:
            raise ObjectiveError(
                f"Expected parameters of at least bfloat16's range. {name!r} is"
                f" {str(dtype).removeprefix('torch.')}, in which second derivatives under-"
                " and overflow. Pass dtype=torch.float32."
            )
    return names


def refuse_training_mode(model: nn.Module) -> None:
    """Raise ObjectiveError if a module would act differently in training mode."""
    for name, module in model.named_modules():
        if not module.training:
            continue
        dropout = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        attention = isinstance(module, nn.MultiheadAttention) and module.dropout > 0
        recurrent = isinstance(module, nn.RNNBase) and module.dropout > 0
        batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        instance_norm = (
            isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats
        )
        if dropout or attention or recurrent or batch_norm or instance_norm:
            raise ObjectiveError(
                "Expected a model in evaluation mode."
                f" {name or 'The model'} ({type(module).__name__}) is in training mode, where"
                " the loss depends on chance or on the split into batches. Call model.eval()."
            )
