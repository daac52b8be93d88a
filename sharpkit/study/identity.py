"""What a score is a score of: the keys by which a study knows what it has measured."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sharpkit import __version__
from sharpkit.errors import SettingsError
from sharpkit.objective import Objective
from sharpkit.objective.batches import tensor_bytes
from sharpkit.objective.states import state_hash
from sharpkit.operators import OptimizerState
from sharpkit.results import to_plain

__all__ = ["Options", "Subject", "identify", "settings_text"]


@dataclass(frozen=True)
class Options:
    """How checkpoints are evaluated: what changes every number of a run.

    Attributes:
        dtype: Evaluate in this dtype, such as ``"float64"``; None: the model's.
        device: Where to evaluate; None: where the recipe puts the model.
        params: Globs of the parameters that are measured; None: as the recipe says.
        max_basis: Most Krylov vectors to hold; None: what a quarter of the memory holds.
        num_groups: Groups of the data for the error from the data; 0: none.
        canonical: Whether to measure the canonical form; see :func:`sharpkit.score`.
        seed: Of every random draw.
        trust_pickle: Allow checkpoints that run code when loaded.
    """

    dtype: str | None = None
    device: str | None = None
    params: tuple[str, ...] | None = None
    max_basis: int | None = None
    num_groups: int = 8
    canonical: bool = False
    seed: int = 0
    trust_pickle: bool = field(default=False, compare=False)

    def torch_dtype(self) -> torch.dtype | None:
        """Return the dtype.

        Raises:
            SettingsError: If torch has no such floating dtype.
        """
        if self.dtype is None:
            return None
        found = getattr(torch, self.dtype, None)
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise SettingsError(
                f"Expected a dtype such as 'float32', 'float64' or 'bfloat16'. Got {self.dtype!r}."
            )
        return found

    def text(self) -> str:
        """Return what of the options a number depends on beside the seed, as JSON.

        Only the kind of the device counts: the second GPU gives what the first one gives.
        """
        plain = asdict(self)
        del plain["seed"], plain["trust_pickle"]
        plain["device"] = None if self.device is None else torch.device(self.device).type
        return json.dumps(plain, sort_keys=True)


@dataclass(frozen=True)
class Subject:
    """A function and the way it is evaluated: what scores belong to, whatever the file's name.

    Attributes:
        weights: Hash of all parameters and buffers.
        recipe: Hash of the recipe's code.
        data: Fingerprint of the data, independent of order and batches.
        beside: Hash of the initial parameters and the optimizer's state; empty without.
        options: :meth:`Options.text`.
        version: Of sharpkit.
    """

    weights: str
    recipe: str
    data: str
    beside: str
    options: str
    version: str = __version__

    @property
    def key(self) -> str:
        """A hash of all of it."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def identify(
    objective: Objective, recipe: str, beside: Mapping[str, Any], options: Options
) -> Subject:
    """Return what the scores of an objective are filed under.

    Args:
        objective: With its weights and data.
        recipe: Hash of the recipe's code.
        beside: ``initial`` and ``optimizer``, as far as the recipe gives them.
        options: Of the run.
    """
    digest = ""
    if beside:
        total = hashlib.sha256()
        for name in sorted(beside):
            total.update(name.encode())
            _feed(total, beside[name])
        digest = total.hexdigest()
    return Subject(
        state_hash(objective), recipe, objective.data_fingerprint, digest, options.text()
    )


def _feed(digest: Any, value: Any) -> None:
    # Names, kinds and contents, in an order that does not depend on how the value was built.
    if isinstance(value, OptimizerState):
        value = vars(value)
    if isinstance(value, (nn.Module, torch.optim.Optimizer)):
        value = value.state_dict()
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(tensor_bytes(value))
    elif isinstance(value, Mapping):
        digest.update(b"{")
        for key in sorted(value, key=lambda k: (str(type(k)), str(k))):
            digest.update(f"{key!r}:".encode())
            _feed(digest, value[key])
        digest.update(b"}")
    elif isinstance(value, (list, tuple)):
        digest.update(f"[{len(value)}".encode())
        for item in value:
            _feed(digest, item)
    else:
        text = re.sub(r" at 0x[0-9a-f]+", "", repr(value))  # an address says nothing
        digest.update(f"{type(value).__name__}{text}".encode())


def settings_text(settings: Mapping[str, Any]) -> str:
    """Return a measure's settings as text that is the same for the same settings."""
    return json.dumps(to_plain(dict(settings)), sort_keys=True)
