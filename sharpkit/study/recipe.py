"""Recipes: a Python file of the user's that says how to build model, loss and data.

A recipe is the user's own code and runs as such. It holds either

- ``model()`` or ``model(checkpoint)``: the network, whose weights sharpkit then loads;
- ``data()``: re-iterable batches, called once for all checkpoints;
- ``loss``: a criterion ``(outputs, targets)``, or ``batch_loss(model, batch)`` returning
  ``(loss_sum, num_terms)``;

or one function ``objective(checkpoint)`` that returns a ready ``sharpkit.Objective``.
Optional: ``test_data()``, other batches (or ``test_objective(checkpoint)`` beside
``objective``), for slices and paths; ``initial(checkpoint)`` (the parameters before training: a
module or a state dict) and ``optimizer(checkpoint)`` (the optimizer's state), for measures that
need them;
``params`` (a selection of parameters), ``load_weights = False`` (``model`` has done it),
``metadata(checkpoint) -> dict`` (generalization gap, hyper-parameters).
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import os
import runpy
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sharpkit.errors import RecipeError, SharpkitError
from sharpkit.objective import Objective
from sharpkit.parameters import Selection
from sharpkit.study.checkpoints import load_checkpoint
from sharpkit.study.source import source_files
from sharpkit.team import Group, Share

__all__ = ["Recipe", "load_recipe"]

BESIDE = ("initial", "optimizer")  # what a recipe may give beside the objective

_STARTED = time.time()
_known: dict[str, str] = {}  # hashes of neighbours, as they were when a recipe was loaded last


@dataclass
class Recipe:
    """A loaded recipe file.

    Attributes:
        path: The file.
        names: What it defines.
    """

    path: Path
    names: Mapping[str, Any]
    _data: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def has_test_data(self) -> bool:
        """Whether the recipe gives other data than those that are measured on."""
        return ("test_objective" if "objective" in self.names else "test_data") in self.names

    def objective(
        self,
        checkpoint: Path | None,
        *,
        dtype: torch.dtype | None = None,
        device: str | None = None,
        params: Selection | None = None,
        trust_pickle: bool = False,
        test: bool = False,
        process_group: Group = None,
        share: Share = "data",
    ) -> tuple[Objective, dict[str, Any]]:
        """Return the objective of a checkpoint, and where its weights came from.

        Args:
            checkpoint: The file; ``None`` takes the model as the recipe builds it.
            dtype: Evaluate in this dtype.
            device: Move the model there.
            params: Overrides the recipe's ``params``.
            trust_pickle: Allow checkpoints that run code when loaded.
            test: On ``test_data()``.
            process_group: Ranks that measure together, as for ``Objective``; a recipe's own
                ``objective`` sees to it by itself.
            share: Likewise.

        Raises:
            RecipeError: If a function of the recipe fails or returns something else than
                it should, or there are no test data.
            CheckpointError: If the checkpoint does not fit.
            ObjectiveError: If the parts do not make an objective.
        """
        if test and not self.has_test_data:
            raise RecipeError(
                f"Expected {self.path} to define test_data() (or test_objective(checkpoint) beside"
                " objective). It does not."
            )
        if "objective" in self.names:
            name = "test_objective" if test else "objective"
            objective = self._call(name, checkpoint)
            if not isinstance(objective, Objective):
                raise RecipeError(
                    f"Expected {name}(checkpoint) in {self.path} to return a"
                    f" sharpkit.Objective. Got {type(objective).__name__}."
                )
            if params is not None:
                objective = objective.restrict(params)
            return objective, {"checkpoint": str(checkpoint)} if checkpoint else {}
        model = self._call("model", checkpoint)
        if not isinstance(model, nn.Module):
            raise RecipeError(
                f"Expected model(...) in {self.path} to return a torch.nn.Module."
                f" Got {type(model).__name__}."
            )
        origin: dict[str, Any] = {}
        if checkpoint is not None:
            origin["checkpoint"] = str(checkpoint)
            if self.names.get("load_weights", True):
                info = load_checkpoint(checkpoint, model, trust_pickle=trust_pickle)
                origin["checkpoint_sha256"] = info.sha256
        if device is not None:
            model = model.to(device)
        model.eval()
        source = "test_data" if test else "data"
        if source not in self._data:
            self._data[source] = self._call(source)
        data = self._data[source]
        how: dict[str, Any] = {"process_group": process_group, "share": share}
        selection = params if params is not None else self.names.get("params", "*")
        if "batch_loss" in self.names:
            objective = Objective.from_batch_loss(
                model, self.names["batch_loss"], data, selection, dtype=dtype, **how
            )
        else:
            objective = Objective(model, self.names["loss"], data, selection, dtype=dtype, **how)
        return objective, origin

    def beside(self, checkpoint: Path | None) -> dict[str, Any]:
        """Return what the recipe gives beside the objective: ``initial`` and ``optimizer``."""
        return {n: self._call(n, checkpoint) for n in BESIDE if n in self.names}

    def metadata(self, checkpoint: Path) -> dict[str, Any]:
        """Return what the recipe knows of a checkpoint; empty if it says nothing."""
        if "metadata" not in self.names:
            return {}
        found = self._call("metadata", checkpoint)
        if not isinstance(found, Mapping):
            raise RecipeError(
                f"Expected metadata(checkpoint) in {self.path} to return a dict."
                f" Got {type(found).__name__}."
            )
        try:
            result: dict[str, Any] = json.loads(json.dumps(dict(found)))
        except (TypeError, ValueError) as error:
            raise RecipeError(
                f"Expected metadata(checkpoint) in {self.path} to hold plain numbers and"
                f" text. {error}."
            ) from error
        return result

    def _call(self, name: str, checkpoint: Path | None = None) -> Any:
        function = self.names[name]
        arguments = [checkpoint] if _takes_argument(function) else []
        try:
            return function(*arguments)
        except SharpkitError:
            raise
        except Exception as error:
            text = " ".join(str(error).split()) or "no message"
            raise RecipeError(
                f"{name}() in {self.path} failed: {type(error).__name__}: {text}"
            ) from error


def _takes_argument(function: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    positional = (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.VAR_POSITIONAL,
    )
    return any(p.kind in positional for p in parameters)


def load_recipe(path: str | Path) -> Recipe:
    """Run a recipe file and check that it defines what is needed.

    Raises:
        RecipeError: If the file is missing, fails, or lacks a definition.
    """
    path = Path(path)
    if not path.is_file():
        what = "a directory" if path.is_dir() else "no such file"
        raise RecipeError(f"Expected a Python recipe file. {path} is {what}.")
    folder = str(path.resolve().parent)
    _forget_changed(path)
    sys.path.insert(0, folder)  # a recipe may import its neighbours, as a script does
    try:
        names = runpy.run_path(str(path))
    except SyntaxError as error:
        raise RecipeError(
            f"Expected Python code in {path}. Line {error.lineno}: {error.msg}."
        ) from error
    except (Exception, SystemExit) as error:
        text = " ".join(str(error).split()) or "no message"
        raise RecipeError(
            f"The recipe {path} failed while it was read: {type(error).__name__}: {text}"
        ) from error
    finally:
        sys.path.remove(folder)
    for name in (*BESIDE, "metadata", "test_data", "test_objective"):
        if name in names:
            _require_callable(path, names, name)
    if "objective" in names:
        _require_callable(path, names, "objective")
        return Recipe(path, names)
    missing = [n for n in ("model", "data") if n not in names]
    if "loss" not in names and "batch_loss" not in names:
        missing.append("loss (or batch_loss)")
    if missing:
        raise RecipeError(
            f"Expected {path} to define model(), data() and loss, or objective(checkpoint)."
            f" Missing: {', '.join(missing)}."
        )
    for name in ("model", "data", "batch_loss"):
        if name in names:
            _require_callable(path, names, name)
    return Recipe(path, names)


def _forget_changed(path: Path) -> None:
    # Neighbours whose files were changed since they were imported: a notebook, and a worker
    # that is used again, would measure with the old code what is filed under the new.
    files = {str(file): file for file in source_files(path)[1:]}
    texts = {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()}
    held: dict[str, str] = {}  # file by module
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__dict__", {}).get("__file__")
        if name != "__main__" and isinstance(file, str) and os.path.realpath(file) in files:
            held[name] = os.path.realpath(file)
    changed = [
        file
        for file in held.values()
        if (_known[file] != texts[file] if file in _known else _is_younger(file))
    ]
    _known.update(texts)
    for name in held if changed else ():  # all: they may hold parts of each other
        del sys.modules[name]
        above, _, last = name.rpartition(".")
        if hasattr(sys.modules.get(above), last):
            delattr(sys.modules[above], last)
    if changed:
        importlib.invalidate_caches()


def _is_younger(file: str) -> bool:
    return os.stat(file).st_mtime > _STARTED


def _require_callable(path: Path, names: Mapping[str, Any], name: str) -> None:
    if not callable(names[name]):
        raise RecipeError(
            f"Expected `{name}` in {path} to be a function. Got {type(names[name]).__name__}."
        )
