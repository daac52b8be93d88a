"""Renyi sharpness: how uneven the Hessian's spectrum is."""

from __future__ import annotations

import math
from dataclasses import replace

from sharpkit import estimators
from sharpkit.analysis import Analysis
from sharpkit.errors import SettingsError
from sharpkit.estimators.functions import SpectrumPart, check_alpha
from sharpkit.measures._entropy import MAX_STEPS, Spectrum, check_quadrature, with_error
from sharpkit.measures.registry import register
from sharpkit.results import Estimate, Part

__all__ = ["renyi"]

FEWEST_SIGNED = 16
FAMILY = (0.5, 1.0, 1.5, 2.0, math.inf)


@register(
    "renyi_sharpness",
    symbol="-H_alpha(|lambda| / sum |lambda|)",
    reference="Zhang et al. 2025, arXiv:2510.07758",
    cost="24 Lanczos steps and num_probes x num_steps HVPs (48 to 384), shared",
    invariant_to={"permutation", "orthogonal", "key_bias_shift"},
    degree=0,
    nonnegative=False,
)
def renyi_sharpness(
    analysis: Analysis,
    *,
    alpha: float = 2.0,
    spectrum: Spectrum = "abs",
    num_probes: int = 4,
    num_steps: int = 12,
    max_steps: int = MAX_STEPS,
) -> Estimate:
    r"""Renyi sharpness of the whole network: minus the Renyi entropy of the spectrum, in nats.

    .. math:: -H_\alpha = \frac{1}{\alpha-1} \log
        \frac{\operatorname{tr}|H|^\alpha}{(\operatorname{tr}|H|)^\alpha}

    Between ``-log P`` (all eigenvalues equal: flat in this sense) and 0 (one direction
    only). Parts are the members of the family for alpha 0.5, 1, 1.5, 2 and inf, from the
    same products. It does not see magnitude: ``cH`` has the entropy of ``H``. For alpha
    below 1 very many eigenvalues at the rounding level can dominate; they are left out, and
    ``details["floor_shift"]`` bounds what they could add. The paper takes layers one by one
    (``renyi_sharpness_per_layer``) and magnitudes of eigenvalues, as ``"abs"`` does.

    The error from the data is to first order in the change of the Hessian: where the data
    decide which eigenvalues are positive (few examples, a wide bulk), it was up to half too
    small.

    Lanczos runs go on until what they leave open of the many eigenvalues near zero is below
    the probes' error; the parts are taken at the steps that ``alpha`` asked for, and say
    themselves whether these suffice. Below alpha 1 they often do not, and the errors are wide.

    Args:
        analysis: What is measured.
        alpha: Order, greater than 0; inf is allowed.
        spectrum: ``"abs"``: magnitudes; ``"clipped"``: without negative eigenvalues;
            ``"ggn"``: of the Gauss-Newton matrix, which has none; ``"signed"``: for alpha
            2 only, from the signed trace and the lengths of at least 16 products, with no
            further Lanczos steps and no vectors held.
        num_probes: Random vectors, beside the Lanczos run's.
        num_steps: Lanczos steps of each to begin with.
        max_steps: Up to how many they go on, while what they leave open of eigenvalues near
            zero is more than the probes' error.

    Raises:
        MeasureError: If the matrix is zero.
    """
    check_quadrature(num_probes, num_steps, max_steps)
    return renyi(analysis, check_alpha(alpha), spectrum, num_probes, num_steps, max_steps)


def renyi(
    analysis: Analysis,
    alpha: float,
    spectrum: Spectrum,
    num_probes: int,
    num_steps: int,
    max_steps: int,
) -> Estimate:
    """Return minus the entropy, with the family as parts."""
    if spectrum == "signed":
        return _signed(analysis, alpha, num_probes)
    spectral = analysis.spectral("ggn" if spectrum == "ggn" else "hessian")
    part: SpectrumPart = "abs" if spectrum == "abs" else "clipped"
    entropy, quadrature = spectral.resolved(
        lambda runs: estimators.renyi_entropy(runs, alpha=alpha, spectrum=part),
        num_probes=num_probes,
        num_steps=num_steps,
        max_steps=max_steps,
    )
    sharpness = replace(
        entropy,
        value=-entropy.value,
        draws=tuple(-d for d in entropy.draws),
        details={**entropy.details, "spectrum": spectrum},
        parts=tuple(
            _member(estimators.renyi_entropy(quadrature, alpha=a, spectrum=part)) for a in FAMILY
        ),
    )
    wrong = analysis.product_error * max(1.0, 1 / alpha)
    sharpness = replace(sharpness, probe_error=math.hypot(sharpness.probe_error or 0.0, wrong))
    first = spectral.quadrature(num_probes=num_probes, num_steps=num_steps)
    return with_error(spectral, quadrature, first, sharpness, alpha, part, -1.0)


def _signed(analysis: Analysis, alpha: float, num_probes: int) -> Estimate:
    if alpha != 2:
        raise SettingsError(
            f"Expected alpha=2 with spectrum='signed'. Got alpha={alpha:g}: other powers of"
            " signed eigenvalues are no entropy. Use 'abs', 'clipped' or 'ggn'."
        )
    spectral = analysis.spectral()
    probes = spectral.probes(max(num_probes, FEWEST_SIGNED))
    entropy = estimators.renyi_entropy_of_probes(probes)
    sharpness = replace(
        entropy,
        value=-entropy.value,
        probe_error=math.hypot(entropy.probe_error or 0.0, analysis.product_error),
        draws=tuple(-d for d in entropy.draws),
    )
    known = probes.locked.values
    trace = float(known.sum() + probes.traces.mean())
    squares = float((known**2).sum() + probes.squares.mean())
    return spectral.with_data_error(sharpness, lambda x: x**2 / squares - 2 * x / trace)


def _member(entropy: Estimate) -> Part:
    return Part(
        f"alpha={entropy.details['alpha']:g}",
        -entropy.value,
        entropy.probe_error,
        entropy.converged,
        dof=entropy.dof,
    )
