"""Figures from results. Functions take and return Axes, and never open a window."""

from sharpkit.plots.audit import plot_audit
from sharpkit.plots.curve import plot_slice
from sharpkit.plots.figure import new_axes, save_figure, tidy
from sharpkit.plots.forest import plot_taus
from sharpkit.plots.parts import plot_eigenvalues, plot_parts
from sharpkit.plots.scatter import plot_against_gap
from sharpkit.plots.spectrum import density_on, plot_cumulative, plot_spectrum

__all__ = [
    "density_on",
    "new_axes",
    "plot_against_gap",
    "plot_audit",
    "plot_cumulative",
    "plot_eigenvalues",
    "plot_parts",
    "plot_slice",
    "plot_spectrum",
    "plot_taus",
    "save_figure",
    "tidy",
]
