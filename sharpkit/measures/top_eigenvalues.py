"""The extreme eigenvalues of the Hessian."""

from sharpkit.analysis import Analysis
from sharpkit.errors import SettingsError
from sharpkit.estimators import Which
from sharpkit.measures.registry import register
from sharpkit.results import Cost, Estimate, Part


@register(
    "top_eigenvalues",
    symbol="lambda_max, lambda_min",
    reference="Lanczos 1950; Sagun et al. 2017, arXiv:1706.04454",
    cost="about 20-120 HVPs",
    invariant_to={"permutation", "orthogonal"},
    degree=1,
    nonnegative=False,
)
def top_eigenvalues(
    analysis: Analysis,
    *,
    k: int = 5,
    which: Which = "both",
    tol: float = 1e-3,
    max_matvecs: int = 400,
) -> Estimate:
    r"""Largest eigenvalue of the Hessian, with the k extreme ones at both ends as parts.

    .. math:: \lambda_{\max} = \max_{\|v\|=1} v^\top H v

    "Largest" is algebraic; the most negative ones tell how far from a minimum the point
    is. The error is the residual of the Ritz pair: an eigenvalue lies within it. Details
    hold a bound beyond which no eigenvalue lies except with a stated small probability.
    lambda_max follows the learning rate more than the generalization (Kaur et al. 2023).

    Args:
        analysis: What is measured.
        k: Eigenvalues at each end.
        which: ``"both"``, ``"largest"`` or ``"smallest"``; for the last the headline value
            is the smallest eigenvalue.
        tol: Relative residual at which a pair has converged.
        max_matvecs: Budget of Hessian-vector products.
    """
    dim = analysis.objective.space.dim
    if k > dim:
        raise SettingsError(f"Expected `k` of at most {dim}, the number of parameters. Got {k}.")
    pairs = analysis.eigenpairs(k=k, which=which, tol=tol, max_matvecs=max_matvecs)
    parts = [
        Part(f"lambda_{i + 1}", value, error, done)
        for i, (value, error, done) in enumerate(
            zip(pairs.largest, pairs.largest_residuals, pairs.largest_converged, strict=True)
        )
    ] + [
        Part(f"lambda_-{i + 1}", value, error, done)
        for i, (value, error, done) in enumerate(
            zip(
                pairs.smallest,
                pairs.smallest_residuals,
                pairs.smallest_converged,
                strict=True,
            )
        )
    ]
    notes = []
    if not pairs.converged:
        late = [p.label for p in parts if not p.converged]
        what = f"{', '.join(late)} did" if late else "The second start was cut off: pairs may"
        notes.append(
            f"{what} not {'converge' if late else 'be complete'} within {max_matvecs}"
            " products. Give a larger `max_matvecs` or a larger `tol`."
        )
    head = parts[0]
    return Estimate(
        value=head.value,
        probe_error=head.probe_error,
        error_kind="bound",
        converged=pairs.converged,
        cost=Cost(hvps=pairs.num_matvecs),
        parts=tuple(parts),
        details={
            "upper_bound": pairs.upper_bound,
            "lower_bound": pairs.lower_bound,
            "failure_probability": pairs.failure_probability,
            "second_start": pairs.second_start,
            "num_steps": pairs.num_steps,
        },
        notes=tuple(notes),
    )
