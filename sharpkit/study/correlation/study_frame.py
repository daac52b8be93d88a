"""From the long table of scores to the models that are correlated, and why the others are not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from sharpkit.errors import SettingsError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Filter", "Models", "Unconverged", "select_models"]

Unconverged: TypeAlias = Literal["keep", "drop"]
META = "meta."
NEEDED = ("checkpoint", "label", "value", "probe_error", "error_kind", "converged", "error")


@dataclass(frozen=True)
class Filter:
    """Which models are correlated.

    Attributes:
        reached: Metadata entry that says whether a model reached its training target; models
            where it is false are left out. Without the entry nothing is.
        train_loss: Metadata entry of the train loss.
        max_train_loss: Models above it are left out; ``None``: no limit.
        unconverged: What becomes of values whose estimate did not converge: ``"keep"`` them,
            counted, or ``"drop"`` them as missing.
    """

    reached: str = "reached_target"
    train_loss: str = "train_loss"
    max_train_loss: float | None = None
    unconverged: Unconverged = "keep"


@dataclass(frozen=True)
class Models:
    """One row a model.

    Attributes:
        meta: Metadata of the models that are used, by name without ``meta.``.
        gap: [n] the gap.
        values: A column a label.
        errors: Likewise, their probe errors.
        kinds: Likewise, what the errors mean.
        converged: Likewise, whether the estimates converged.
        sentence: The filter, in words, with counts.
        notes: What else the reader must know of the choice.
    """

    meta: pd.DataFrame
    gap: np.ndarray
    values: pd.DataFrame
    errors: pd.DataFrame
    kinds: pd.DataFrame
    converged: pd.DataFrame
    sentence: str
    notes: tuple[str, ...]

    def column(self, name: str) -> pd.Series[Any]:
        """Return metadata by name, its last part, or the values of a label."""
        found = find_column(list(self.meta.columns), name)
        if found is not None:
            return self.meta[found]
        if name in self.values.columns:
            return self.values[name]
        raise SettingsError(
            f"Expected {name!r} among the metadata ({', '.join(map(str, self.meta.columns))}) or"
            f" the measures. Let the recipe's metadata() give it."
        )


def find_column(names: Sequence[str], name: str) -> str | None:
    """Return the entry called so, or the only one whose last part is; None if there is none."""
    name = name.removeprefix(META)
    if name in names:
        return name
    ending = [n for n in names if n.rsplit(".", 1)[-1] == name]
    if len(ending) > 1:
        raise SettingsError(
            f"Expected one metadata entry {name!r}. Got {', '.join(ending)}. Write it in full."
        )
    return ending[0] if ending else None


def _false(value: Any) -> bool:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return False
    if isinstance(value, str):
        return value.strip().lower() in ("false", "0", "no")
    return not bool(value)


def select_models(
    scores: pd.DataFrame,
    gap: str,
    chosen: Filter = Filter(),
    measures: Sequence[str] | None = None,
) -> Models:
    """Apply the filter to a long table with a row per checkpoint, measure and settings.

    Args:
        scores: Columns ``checkpoint``, ``label`` (what is correlated), ``value``,
            ``probe_error``, ``error_kind``, ``converged``, ``error``, and ``meta.<name>`` for
            each entry of the metadata. Of several seeds of a label the lowest is taken. With
            ``subject`` (what the scores are kept under, so the same for the same weights) a
            checkpoint that repeats another one is left out.
        gap: Metadata entry of the generalization gap.
        chosen: The filter.
        measures: Labels, or names of measures (all their labels); ``None``: all.

    Raises:
        SettingsError: If a column, the gap or a measure is missing, or the filter makes no
            sense.
    """
    import pandas as pd

    missing = [c for c in NEEDED if c not in scores.columns]
    if missing:
        raise SettingsError(
            f"Expected a long table with {', '.join(NEEDED)}. Missing: {', '.join(missing)}."
        )
    if chosen.unconverged not in ("keep", "drop"):
        raise SettingsError(
            f"Expected `unconverged` to be 'keep' or 'drop'. Got {chosen.unconverged!r}."
        )
    first = scores.drop_duplicates("checkpoint").set_index("checkpoint")
    meta = first[[c for c in scores.columns if c.startswith(META)]]
    meta = meta.rename(columns=lambda c: str(c).removeprefix(META))
    names = [str(c) for c in meta.columns]
    found = find_column(names, gap)
    if found is None:
        raise SettingsError(
            f"Expected the gap {gap!r} among the metadata. Got {', '.join(names) or 'none'}. Let"
            " the recipe's metadata() give it."
        )
    gaps = pd.to_numeric(meta[found], errors="coerce").to_numpy(dtype=float)
    scored = scores[scores["label"].notna()]
    labels = _labels(scored, measures)
    keep, parts = _reasons(
        meta, gaps, first.index.isin(scored["checkpoint"]), _repeated(scores, first), chosen, found
    )
    notes = []
    ordered = scored.sort_values("seed", kind="stable") if "seed" in scored.columns else scored
    single = ordered.drop_duplicates(["checkpoint", "label"])
    if len(single) < len(scored):
        notes.append(
            f"{len(scored) - len(single)} scores are repetitions with another seed; of each the"
            " lowest seed is taken."
        )
    used = list(meta.index[keep])

    def wide(column: str) -> pd.DataFrame:
        table = single.pivot(index="checkpoint", columns="label", values=column)
        return table.reindex(index=used, columns=labels)

    values = wide("value").apply(pd.to_numeric, errors="coerce").astype(float)
    values = values.where(np.isfinite(values))
    converged = wide("converged").map(lambda v: not _false(v))
    if chosen.unconverged == "drop":
        values = values.where(converged)
    text = f"{int(keep.sum())} of {len(keep)} models are correlated"
    text += f"; left out: {'; '.join(parts)}." if parts else "; none is left out."
    if find_column(names, chosen.reached) is None and chosen.max_train_loss is None:
        text += (
            f" Nothing says which models converged (no `{chosen.reached}` in the metadata, no"
            " limit of the train loss)."
        )
    return Models(
        meta=meta[keep],
        gap=gaps[keep],
        values=values,
        errors=wide("probe_error").apply(pd.to_numeric, errors="coerce").astype(float),
        kinds=wide("error_kind"),
        converged=converged,
        sentence=text,
        notes=tuple(notes),
    )


def _labels(scored: pd.DataFrame, measures: Sequence[str] | None) -> list[str]:
    every = sorted({str(v) for v in scored["label"]})
    if measures is None:
        return every
    result = []
    for name in measures:
        mine = [name] if name in every else []
        if not mine and "measure" in scored.columns:
            mine = sorted({str(v) for v in scored["label"][scored["measure"] == name]})
        if not mine:
            raise SettingsError(
                f"Expected measures that were scored. Got {name!r}. There are {', '.join(every)}."
            )
        result += [m for m in mine if m not in result]
    return result


def _repeated(scores: pd.DataFrame, first: pd.DataFrame) -> np.ndarray:
    # Checkpoints that hold the weights of an earlier one (a copy, a folder that was moved): they
    # would count as a second, independent model. Told by what their scores are kept under.
    if "subject" not in scores.columns:
        return np.zeros(len(first), dtype=bool)
    known = scores[scores["subject"].notna()].drop_duplicates(["checkpoint", "subject"])
    twice = known["subject"].duplicated()
    originals = set(known["checkpoint"][~twice])  # has weights, under some options, of its own
    copies = set(known["checkpoint"][twice]) - originals
    return np.asarray(first.index.isin(copies), dtype=bool)


def _reasons(
    meta: pd.DataFrame,
    gaps: np.ndarray,
    scored: np.ndarray,
    repeated: np.ndarray,
    chosen: Filter,
    gap: str,
) -> tuple[np.ndarray, list[str]]:
    # Each model that is left out counts under the first reason that holds.
    names = [str(c) for c in meta.columns]
    tests = [(~scored, "{} without a score"), (repeated, "{} with the weights of another one")]
    reached = find_column(names, chosen.reached)
    if reached is not None:
        failed = np.array([_false(v) for v in meta[reached]], dtype=bool)
        tests.append((failed, f"{{}} that did not converge (`{reached}` is false)"))
    if chosen.max_train_loss is not None:
        column = find_column(names, chosen.train_loss)
        if column is None:
            raise SettingsError(
                f"Expected the train loss {chosen.train_loss!r} among the metadata. Got"
                f" {', '.join(names) or 'none'}. Leave out `max_train_loss`, or name the entry."
            )
        import pandas as pd

        loss = pd.to_numeric(meta[column], errors="coerce").to_numpy(dtype=float)
        limit = chosen.max_train_loss
        tests.append((~(loss <= limit), f"{{}} with `{column}` above {limit:g} or not finite"))
    tests.append((~np.isfinite(gaps), f"{{}} with `{gap}` missing or not finite"))
    keep, parts = np.ones(len(meta), dtype=bool), []
    for bad, text in tests:
        count = int((bad & keep).sum())
        if count:
            parts.append(text.format(count))
        keep &= ~bad
    return keep, parts
