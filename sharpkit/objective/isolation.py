"""Evaluate a user's module without leaving a trace, and with kernels that differentiate.

Everything here is a context that puts back what it found, also after an exception.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["evaluation", "is_compiled", "is_out_of_memory", "preserve_rng", "unwrap"]

PASS_SEED = 20100  # every pass over the data starts from the same random state


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside DDP, DataParallel and ``torch.compile`` wrappers."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        else:
            inner = getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def is_compiled(model: nn.Module) -> bool:
    """Return whether the module or one inside it would run compiled code."""
    return any(
        hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None
        for m in model.modules()
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception says that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "out of memory" in text or "not enough memory" in text or "can't allocate memory" in text
    )


@contextlib.contextmanager
def preserve_rng(seed: int | None = None) -> Iterator[None]:
    """Put back the random states of torch, numpy and Python at the end.

    Args:
        seed: Start from this seed inside; ``None`` goes on from the present states.
    """
    initialized = bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
    devices = list(range(torch.cuda.device_count())) if initialized else []
    with torch.random.fork_rng(devices=devices):
        python_state, numpy_state = random.getstate(), np.random.get_state()
        try:
            if seed is not None:
                torch.default_generator.manual_seed(seed)
                if devices:  # seeding CUDA before it is initialised would outlast us
                    torch.cuda.manual_seed_all(seed)
                random.seed(seed)
                np.random.seed(seed % 2**32)
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextlib.contextmanager
def evaluation(model: nn.Module, *, grad: bool, seed: int = PASS_SEED) -> Iterator[None]:
    """Run a model inside: no trace left, gradients as asked, differentiable kernels.

    Fused attention has no second derivative and the inference fast path of
    ``nn.TransformerEncoderLayer`` changes padded outputs, so the math kernel is used and
    the fast path is off; cuDNN's recurrent kernels, which have no second derivative
    either, are off for models that hold an RNN. Compiled modules run eagerly.

    Args:
        model: Only asked what it is made of.
        grad: Whether autograd records.
        seed: Random state at the start, so that every pass sees the same data.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(preserve_rng(seed))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(grad))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_no_fast_path())
        if torch.cuda.is_available() and any(isinstance(m, nn.RNNBase) for m in model.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        if is_compiled(model):
            stack.enter_context(_eager())
        yield


@contextlib.contextmanager
def _no_fast_path() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _eager() -> Any:
    # torch._dynamo is slow to import: whoever compiled a module has imported it already.
    if "torch._dynamo" in sys.modules:
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()
