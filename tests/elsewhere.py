"""An accelerator that is none: tensors that refuse to be mixed with the host's.

They live on the device "meta" and hold their numbers in a tensor of the host beside it, so
that every operation gives what the CPU gives, and what an accelerator would refuse is
refused. Reads by the host are counted, with the largest.
"""

import contextlib
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

FAR = torch.device("meta")
MAY_MIX = {"copy_", "index", "index_put", "index_put_", "_index_put_impl_", "_to_copy"}


class Far(torch.Tensor):
    """A tensor of the accelerator."""

    @staticmethod
    def __new__(cls, near):
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            near.size(),
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            layout=near.layout,
            device=FAR,
        )
        self.near = near
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {}, Reads())

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __getitem__(self, index):
        return super().__getitem__(_tensors(index))

    def __setitem__(self, index, value):
        super().__setitem__(_tensors(index), value)

    def tolist(self):
        return self.to("cpu").tolist()


def _tensors(index):
    # Lists become tensors of the host, which may index; on "meta" torch forgets their numbers.
    parts = index if isinstance(index, tuple) else (index,)
    return tuple(torch.tensor(i, device="cpu") if isinstance(i, list) else i for i in parts)


class Reads:
    """How often the host read from the accelerator, and how many numbers at most."""

    def __init__(self):
        self.count = self.largest = 0

    def note(self, numel):
        self.count, self.largest = self.count + 1, max(self.largest, numel)


def run(func, args, kwargs, reads):
    flat = tree_flatten((args, kwargs))[0]
    far = any(isinstance(x, Far) for x in flat)
    name = func.overloadpacket.__name__
    if far and name not in MAY_MIX:
        strangers = [x for x in flat if isinstance(x, torch.Tensor) and not isinstance(x, Far)]
        if any(x.ndim > 0 for x in strangers):
            raise RuntimeError(f"{func}: expected all tensors on the same device")
    device = kwargs.get("device")
    if far and (name == "_local_scalar_dense" or (device is not None and device.type == "cpu")):
        reads.note(next(x for x in flat if isinstance(x, Far)).numel())
    near = tree_map_only(Far, lambda x: x.near, (args, kwargs))
    if device is not None:
        near[1]["device"] = torch.device("cpu")
    out = func(*near[0], **near[1])
    if device.type == "meta" if device is not None else far and args and name != "copy_":
        out = tree_map_only(torch.Tensor, Far, out)
    elif name == "copy_":
        if far and not isinstance(args[0], Far):
            reads.note(args[0].numel())
        return args[0]
    return return_and_correct_aliasing(func, args, kwargs, out) if far else out


_Host = torch.Generator


class _Generator(torch.Generator):
    # There are none on "meta".
    def __new__(cls, device="cpu"):
        return _Host("cpu")


class _Mode(TorchDispatchMode):
    def __init__(self, reads):
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {}, self.reads)


@contextlib.contextmanager
def accelerator():
    """Let tensors be made on FAR inside; yields what the host reads."""
    reads = Reads()
    with _Mode(reads), mock.patch("torch.Generator", _Generator):
        yield reads
