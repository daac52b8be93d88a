"""Correlations by counting, in plain loops: what the fast code must agree with."""

import itertools
import math

import numpy as np
import pandas as pd


def tau_b(x, y, pairs=None):
    if pairs is None:
        pairs = list(itertools.combinations(range(len(x)), 2))
    shared = in_x = in_y = 0
    for i, j in pairs:
        a, b = np.sign(x[i] - x[j]), np.sign(y[i] - y[j])
        shared, in_x, in_y = shared + a * b, in_x + abs(a), in_y + abs(b)
    return shared / math.sqrt(in_x * in_y) if in_x * in_y else math.nan


def tau_of_resample(x, y, clusters, counts):
    """A resample written out; copies of one cluster make no pairs with each other."""
    models = [
        (i, (c, copy))
        for c, times in enumerate(counts)
        for copy in range(int(times))
        for i in np.flatnonzero(clusters == c)
    ]
    a, b = [x[i] for i, _ in models], [y[i] for i, _ in models]
    pairs = [
        (p, q)
        for p, q in itertools.combinations(range(len(models)), 2)
        if models[p][1][0] != models[q][1][0] or models[p][1] == models[q][1]
    ]
    return tau_b(a, b, pairs)


def psi_of_axis(x, y, table, axis):
    """The mean over fixings of tau over the pairs that differ in the axis, and nothing else."""
    others = [c for c in table.columns if c != axis]
    taus = []
    for _, rows in table.reset_index(drop=True).groupby(others):
        pairs = [
            (i, j)
            for i, j in itertools.combinations(rows.index, 2)
            if rows[axis][i] != rows[axis][j]
        ]
        taus.append(tau_b(x, y, pairs))
    return float(np.nanmean(taus))


def weight(gap, n):
    sure = max(0.0, 1 - 2 * math.exp(-2 * n * (gap / 2) ** 2)) ** 2
    return sure - 0.5 if sure > 0.5 else 0.0


def sign_errors(x, y, table, name_of, n=None):
    """Weighted sign-errors of environments; ``name_of(axis, i, j)`` names a pair's."""
    sums = {}
    for i, j in itertools.combinations(range(len(x)), 2):
        axes = [c for c in table.columns if table[c].iloc[i] != table[c].iloc[j]]
        if len(axes) != 1:
            continue
        w = 1.0 if n is None else weight(abs(y[i] - y[j]), n)
        wrong = (1 - np.sign(x[i] - x[j]) * np.sign(y[i] - y[j])) / 2
        total = sums.setdefault(name_of(axes[0], i, j), [0.0, 0.0])
        total[0] += w * wrong
        total[1] += w
    return {k: a / b for k, (a, b) in sums.items() if b > 0}


def holm(p):
    """By the procedure: reject one after the other; the least level at which each goes."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    result, worst = [0.0] * len(p), 0.0
    for step, i in enumerate(order):
        worst = max(worst, min(1.0, (len(p) - step) * p[i]))
        result[i] = worst
    return result


def long_table(values, meta, **more):
    """The long table of scores from a dict of columns and a frame of metadata."""
    rows = []
    for name, column in values.items():
        for i, v in enumerate(column):
            row = {
                "checkpoint": f"m{i:03d}", "label": name, "measure": name, "settings": "{}",
                "seed": 0, "value": v, "probe_error": 0.0, "data_error": None,
                "error_kind": "rounding", "dof": None, "converged": True, "error": None,
            }  # fmt: skip
            row |= {k: c[i] if isinstance(c, (list, np.ndarray)) else c for k, c in more.items()}
            row |= {f"meta.{k}": meta[k].iloc[i] for k in meta.columns}
            rows.append(row)
    return pd.DataFrame(rows)
