"""The command that draws the Hessian's spectrum."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sharpkit.cli_options import (
    DeviceOption,
    DtypeOption,
    ParamsOption,
    RecipeOption,
    TrustOption,
    check_figure,
    read_device,
    read_dtype,
    stderr,
    stdout,
)
from sharpkit.cli_tables import print_result
from sharpkit.study.runner import CheckpointScores

__all__ = ["draw_spectrum"]


def draw_spectrum(
    checkpoint: Annotated[Path, typer.Argument(help="One file of weights.")],
    recipe: RecipeOption,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Draw the density: .png, .pdf, .svg.")
    ] = None,
    count: Annotated[int, typer.Option("-k", help="Eigenvalues of each end.")] = 5,
    tol: Annotated[float, typer.Option(help="Relative tolerance of the eigenvalues.")] = 1e-3,
    probes: Annotated[int, typer.Option(help="Random probes of the trace.")] = 16,
    log: Annotated[
        bool, typer.Option("--log", help="Eigenvalues on a logarithmic axis, both signs.")
    ] = False,
    cumulative: Annotated[
        bool, typer.Option("--cumulative", help="Draw the cumulative distribution with its band.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of every random draw.")] = 0,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    params: ParamsOption = None,
    trust_pickle: TrustOption = False,
) -> None:
    """Measure the Hessian's ends, trace and density in one run, and draw the density."""
    from sharpkit.overview import spectrum
    from sharpkit.study.recipe import load_recipe

    if output is not None:
        check_figure(output)
    objective, _ = load_recipe(recipe).objective(
        checkpoint,
        dtype=read_dtype(dtype),
        device=read_device(device),
        params=params or None,
        trust_pickle=trust_pickle,
    )
    found = spectrum(objective, k=count, tol=tol, num_probes=probes, seed=seed)
    if as_json:
        sys.stdout.write(found.to_json() + "\n")
    else:
        result = CheckpointScores(checkpoint, found.scores, {}, None)
        print_result(stdout(), result, parts=True)
    if output is not None:
        from sharpkit import plots

        if cumulative:
            axes = plots.plot_cumulative(found.density, title=checkpoint.name)
        else:
            scale: Any = "log" if log else "linear"
            parts = {p.label: p.value for p in found["top_eigenvalues"].parts}
            axes = plots.plot_spectrum(
                found.density,
                title=checkpoint.name,
                x_scale=scale,
                ends=(parts["lambda_-1"], parts["lambda_1"]),
            )
        plots.save_figure(axes, output)
        stderr().print(f"{output} written", markup=False)
