"""Figures from results. Functions take and return Axes, and never open a window."""

from sharpkit.plots.audit import plot_audit
from sharpkit.plots.contour import plot_contour
from sharpkit.plots.curve import plot_slice
from sharpkit.plots.figure import new_axes, save_figure, tidy
from sharpkit.plots.forest import plot_taus
from sharpkit.plots.interactive import interactive_page
from sharpkit.plots.line import plot_line
from sharpkit.plots.panels import plot_slices
from sharpkit.plots.parts import plot_eigenvalues, plot_parts
from sharpkit.plots.profile import plot_profile
from sharpkit.plots.scatter import plot_against_gap
from sharpkit.plots.spectrum import density_on, plot_cumulative, plot_spectrum
from sharpkit.plots.surface import plot_surface
from sharpkit.plots.tracking import plot_tracking

__all__ = [
    "density_on",
    "interactive_page",
    "new_axes",
    "plot_against_gap",
    "plot_audit",
    "plot_contour",
    "plot_cumulative",
    "plot_eigenvalues",
    "plot_line",
    "plot_parts",
    "plot_profile",
    "plot_slice",
    "plot_slices",
    "plot_spectrum",
    "plot_surface",
    "plot_taus",
    "plot_tracking",
    "save_figure",
    "tidy",
]
