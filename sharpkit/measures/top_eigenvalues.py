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
    invariant_to={"permutation", "orthogonal", "key_bias_shift"},
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
    block_size: int = 1,
) -> Estimate:
    r"""Largest eigenvalue of the Hessian, with the k extreme ones at both ends as parts.

    .. math:: \lambda_{\max} = \max_{\|v\|=1} v^\top H v

    "Largest" is algebraic; the most negative ones tell how far from a minimum the point
    is. The error is the residual of the Ritz pair, or more where neighbours are not told
    apart; a second random start looks for what was missed. Details hold a bound beyond
    which no eigenvalue lies except with a stated small probability.
    lambda_max follows the learning rate more than the generalization (Kaur et al. 2023).

    Args:
        analysis: What is measured.
        k: Eigenvalues at each end.
        which: ``"both"``, ``"largest"`` or ``"smallest"``; for the last the headline value
            is the smallest eigenvalue.
        tol: Relative error at which a pair has converged; at most 0.01.
        max_matvecs: Budget of Hessian-vector products.
        block_size: Vectors multiplied together; two or more resolve repeated eigenvalues.
    """
    dim = analysis.objective.space.dim
    if k > dim:
        raise SettingsError(f"Expected `k` of at most {dim}, the number of parameters. Got {k}.")
    pairs = analysis.eigenpairs(
        k=k, which=which, tol=tol, max_matvecs=max_matvecs, block_size=block_size
    )
    # What is wrong in the same way in every product, no residual shows.
    wrong = analysis.product_error * max(map(abs, pairs.largest + pairs.smallest))
    parts = [
        Part(f"lambda_{i + 1}", value, error + wrong, done)
        for i, (value, error, done) in enumerate(
            zip(pairs.largest, pairs.largest_residuals, pairs.largest_converged, strict=True)
        )
    ] + [
        Part(f"lambda_-{i + 1}", value, error + wrong, done)
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
        late = ", ".join(p.label for p in parts if not p.converged) or "The check for more pairs"
        notes.append(
            f"{late} did not converge: {pairs.num_matvecs} of {max_matvecs} products were used."
            " Give a larger `max_matvecs` or a larger `tol`."
        )
    notes += analysis.saturation_note()
    head = parts[0]
    vectors = pairs.smallest_vectors if which == "smallest" else pairs.largest_vectors
    estimate = Estimate(
        value=head.value,
        probe_error=head.probe_error,
        error_kind="bound",
        converged=pairs.converged and not analysis.saturated,
        cost=Cost(hvps=pairs.num_matvecs),
        parts=tuple(parts),
        details={
            "upper_bound": pairs.upper_bound + wrong,
            "lower_bound": pairs.lower_bound - wrong,
            "failure_probability": pairs.failure_probability,
            "second_start": pairs.second_start,
            "num_steps": pairs.num_steps,
            "num_restarts": pairs.num_restarts,
        },
        notes=tuple(notes),
    )
    return analysis.spectral().eigenvalue_data_error(estimate, vectors[:, 0])
