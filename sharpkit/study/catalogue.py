"""The catalogue of measures as a page: what each is and what it claims."""

from __future__ import annotations

import inspect
import re

from sharpkit import measures
from sharpkit.measures.registry import NEEDS

__all__ = ["catalogue_markdown"]

INTRODUCTION = """\
# Measures

Written by `sharpkit measures --markdown`; a test compares it with the registry. Each claim is
proven on random networks by `sharpkit.testing.check_measure`, and every symmetry that is not
claimed is shown to move the measure. Which one to take: [which-measure.md](which-measure.md).

## What leaves them unchanged
"""


def catalogue_markdown() -> str:
    """Return the catalogue in Markdown: symmetries, a table of claims, every definition.

    Example:
        >>> catalogue_markdown().splitlines()[0]
        '# Measures'
    """
    every = [measures.get(name) for name in measures.names()]
    lines = [INTRODUCTION]
    lines += [f"- `{name}`: {text}" for name, text in measures.SYMMETRIES.items()]
    lines += [
        "",
        "`c^d`: what becomes of the measure if the loss is multiplied by c (-: no power of c).",
        "",
        _row(["measure", *(f"`{s}`" for s in measures.SYMMETRIES), "L -> cL"]),
        _row(["---"] * (len(measures.SYMMETRIES) + 2)),
    ]
    for m in every:
        claims = ["yes" if s in m.invariant_to else "" for s in measures.SYMMETRIES]
        lines.append(_row([f"[{m.name}](#{m.name})", *claims, _degree(m)]))
    lines += ["", "## Definitions"]
    for m in every:
        lines += ["", f"### {m.name}", "", f"`{m.symbol}`", "", *_body(m), ""]
        needs = "; ".join(NEEDS[n] for n in sorted(m.needs))
        settings = ", ".join(f"`{k}={v}`" for k, v in m.settings.items())
        lines += [
            f"- invariant to: {_list(m, claimed=True)}",
            f"- changed by: {_list(m, claimed=False)}",
            f"- settings: {settings or 'none'}",
            *([f"- needs: {needs}"] if needs else []),
            f"- cost: {m.cost}",
            f"- reference: {m.reference}",
        ]
    return "\n".join(lines) + "\n"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _degree(m: measures.Measure) -> str:
    return "-" if m.degree is None else f"c^{m.degree:g}"


def _list(m: measures.Measure, *, claimed: bool) -> str:
    names = [s for s in measures.SYMMETRIES if (s in m.invariant_to) is claimed]
    return ", ".join(names) or "nothing"


def _body(m: measures.Measure) -> list[str]:
    # The docstring up to its arguments; formulas fenced.
    lines: list[str] = []
    for paragraph in (inspect.getdoc(m.function) or "").split("\n\n"):
        if paragraph.startswith("Args:"):
            break
        if lines:
            lines.append("")
        if paragraph.startswith(".. math::"):
            formula = [t.strip() for t in paragraph.removeprefix(".. math::").splitlines()]
            lines += ["```math", *filter(None, formula), "```"]
        else:
            text = " ".join(t.strip() for t in paragraph.splitlines()).replace("``", "`")
            lines.append(re.sub(r":math:`([^`]*)`", r"$\1$", text))
    return lines
