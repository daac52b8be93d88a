"""Evaluate a user's module without leaving a trace, and with kernels that differentiate.

Everything here is a context that puts back what it found, also after an exception.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["evaluation", "is_out_of_memory", "preserve_rng", "recording", "start_from", "unwrap"]

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


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception says that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "out of memory" in text
        or "not enough memory" in text
        or "can't allocate memory" in text
        or "STATUS_ALLOC_FAILED" in text
    )


@contextlib.contextmanager
def preserve_rng(
    seed: int | None = None, generators: Sequence[torch.Generator] = ()
) -> Iterator[None]:
    """Put back the random states of torch, numpy and Python at the end.

    Args:
        seed: Start from this seed inside; ``None`` goes on from the present states.
        generators: Further generators to treat so.
    """
    initialized = bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
    devices = list(range(torch.cuda.device_count())) if initialized else []
    with torch.random.fork_rng(devices=devices):
        python_state, numpy_state = random.getstate(), np.random.get_state()
        states = [generator.get_state() for generator in generators]
        try:
            if seed is not None:
                start_from(seed, generators)
            yield
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def start_from(seed: int, generators: Sequence[torch.Generator] = ()) -> None:
    """Start torch, numpy, Python and further generators from a seed; inside `preserve_rng`."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)  # before it is initialised this would outlast us
    random.seed(seed)
    np.random.seed(seed % 2**32)
    for generator in generators:
        generator.manual_seed(seed)


@contextlib.contextmanager
def evaluation(
    model: nn.Module,
    *,
    grad: bool,
    seed: int = PASS_SEED,
    flags: Mapping[nn.Module, bool] | None = None,
    generators: Sequence[torch.Generator] = (),
    fused: bool = False,
) -> Iterator[None]:
    """Run a model inside: no trace left, gradients as asked, differentiable kernels.

    Fused attention has no second derivative and the inference fast path of
    ``nn.TransformerEncoderLayer`` changes padded outputs, so the math kernel is used and
    the fast path is off; cuDNN's recurrent kernels, which have no second derivative
    either, are off for models that hold an RNN. Compiled modules run eagerly, and an
    autocast region around the call does not reach in.

    Args:
        model: Only asked what it is made of.
        grad: Whether autograd records.
        seed: Random state at the start, so that every pass sees the same data.
        flags: Which modules to put in training mode inside, and which not.
        generators: The data's own generators, which start from the seed too.
        fused: Whether attention may use the kernels without a second derivative, for passes
            that need none; outputs are the same up to rounding.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(preserve_rng(seed, generators))
        stack.enter_context(recording(grad))
        if not fused:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_no_fast_path())
        stack.enter_context(_training_flags(flags or {}))
        for kind in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.cuda.is_available() and any(isinstance(m, nn.RNNBase) for m in model.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.enter_context(_eager())
        yield


@contextlib.contextmanager
def recording(grad: bool) -> Iterator[None]:
    """Let autograd record or not, whatever surrounds: inference mode, a loader's no_grad."""
    with torch.inference_mode(False), torch.set_grad_enabled(grad):
        yield


@contextlib.contextmanager
def _training_flags(flags: Mapping[nn.Module, bool]) -> Iterator[None]:
    others = [module for module, flag in flags.items() if module.training != flag]
    try:
        for module in others:
            module.training = flags[module]
        yield
    finally:
        for module in others:
            module.training = not flags[module]


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
