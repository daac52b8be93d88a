"""The commands that draw losses: slice and path."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.text import Text

from sharpkit.cli_options import (
    INTERRUPTED,
    DeviceOption,
    DtypeOption,
    ParamsOption,
    RecipeOption,
    TrustOption,
    leave,
    progress_bar,
    read_device,
    read_dtype,
    stderr,
    stdout,
)
from sharpkit.cli_tables import frame_table
from sharpkit.errors import SettingsError
from sharpkit.landscape import (
    Slice,
    SliceProgress,
    Status,
    caption,
    load_slice,
    remove_parts,
    save_slice,
)
from sharpkit.study.checkpoints import find_checkpoints
from sharpkit.study.slicing import DIRECTIONS, OF_SEVERAL, Source, Wanted, slices_of

__all__ = ["draw_slice", "measure_path"]

FIGURES, DATA, PAGES = (".png", ".pdf", ".svg"), (".npz", ".csv", ".vtp"), (".html",)


def draw_slice(
    checkpoints: Annotated[
        list[str],
        typer.Argument(help="Files, folders or globs; or one .npz that was saved: to draw again."),
    ],
    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", "-r", help="Python file with model(), data() and loss."),
    ] = None,
    output: Annotated[
        list[Path] | None,
        typer.Option(
            "-o",
            "--output",
            help="Figure (.png .pdf .svg), page (.html), data (.npz .csv .vtp); may be repeated.",
        ),
    ] = None,
    x: Annotated[
        str | None,
        typer.Option("-x", help="Range start:stop:count; default -1:1:51, or all checkpoints."),
    ] = None,
    y: Annotated[
        str | None, typer.Option("-y", help="Range along a second axis; auto: as suits.")
    ] = None,
    directions: Annotated[
        str,
        typer.Option("--directions", "-d", help=f"One, or two by a comma: {' '.join(DIRECTIONS)}."),
    ] = "filter",
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric", help="Beside the loss: accuracy, the default where labels are classes."
        ),
    ] = None,
    show: Annotated[
        str | None, typer.Option("--show", help="Which value a plane's figure shows.")
    ] = None,
    test: Annotated[bool, typer.Option("--test", help="On the recipe's test_data() too.")] = False,
    loss_max: Annotated[
        float | None,
        typer.Option("--loss-max", help="Leave out what is higher, and do not sum it to the end."),
    ] = None,
    refine: Annotated[
        float | None,
        typer.Option("--refine", help="Interpolate within this share of the value, such as 0.02."),
    ] = None,
    batch_norm: Annotated[
        str, typer.Option("--batch-norm", help="Running statistics: keep or reestimate.")
    ] = "keep",
    quadratic: Annotated[
        bool, typer.Option("--quadratic", help="Add the quadratic model.")
    ] = False,
    orthogonal: Annotated[
        bool, typer.Option("--orthogonal", help="Orthogonalise the second direction.")
    ] = False,
    canonical: Annotated[
        bool, typer.Option("--canonical", help="At the canonical form of the network.")
    ] = False,
    surface: Annotated[
        bool, typer.Option("--surface", help="Draw a plane as a 3-D surface.")
    ] = False,
    linear: Annotated[
        bool, typer.Option("--linear", help="Linear instead of logarithmic levels.")
    ] = False,
    rise: Annotated[
        float, typer.Option(help="Rise of the quadratic model at one step (eigen, gradient).")
    ] = 0.1,
    rho: Annotated[float, typer.Option(help="Radius of the adversarial ball.")] = 0.05,
    seed: Annotated[int, typer.Option(help="Seed of random directions.")] = 0,
    groups: Annotated[int, typer.Option(help="Groups of the data for errors; 1: none.")] = 8,
    workers: Annotated[int, typer.Option(help="Processes.")] = 1,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    params: ParamsOption = None,
    trust_pickle: TrustOption = False,
) -> None:
    """Draw the loss along directions through checkpoints.

    With -y a plane, otherwise a line. The data are saved beside every figure (.npz), from which
    "sharpkit slice FILE.npz -o FIGURE" draws again without the model. An interrupted command goes
    on where it was.
    """
    outputs = output or []
    for path in outputs:
        _check_output(path)
    if len(checkpoints) >= 1 and all(c.lower().endswith(".npz") for c in checkpoints):
        _write([load_slice(c) for c in checkpoints], outputs, show, surface, linear, data=False)
        return
    if recipe is None:
        raise SettingsError(
            "Expected --recipe FILE.py with checkpoints (or .npz files of slices, without). Got"
            " none."
        )
    if not outputs:
        raise SettingsError("Expected -o FILE, such as -o slice.png. Got none.")
    files = find_checkpoints(checkpoints)
    auto = y is not None and y.strip().lower() == "auto"
    wanted = Wanted(
        directions=tuple(d.strip() for d in directions.split(",")),
        x=x,
        y=None if auto else y,
        plane=auto,
        seed=seed,
        rise=rise,
        rho=rho,
        orthogonal=orthogonal,
        metrics=tuple(metric) if metric else None,
        options={
            "loss_max": loss_max,
            "refine": refine,
            "batch_norm": batch_norm,
            "quadratic": quadratic,
            "num_groups": groups,
            "workers": workers,
        },
        command=shlex.join(["sharpkit", *sys.argv[1:]]) if sys.argv[1:2] == ["slice"] else "",
    )
    wanted.check(len(files))
    together = wanted.directions[0] in OF_SEVERAL
    _check_beside(outputs, 1 if together else len(files))
    group, rank = _ranks()
    source = partial(
        Source,
        recipe,
        dtype=read_dtype(dtype),
        device=read_device(device),
        params=tuple(params) if params else None,
        trust_pickle=trust_pickle,
        test=test,
        canonical=canonical,
        group=group,
    )
    folder = outputs[0].with_name(f"{outputs[0].name}.parts")
    try:
        found = _computed(files, source, wanted, folder, quiet=rank > 0)
    except KeyboardInterrupt:
        stderr().print(f"interrupted: the points are kept in {folder}; go on with the same command")
        leave(INTERRUPTED)
        return
    if rank == 0:
        _write(found, outputs, show, surface, linear, data=True)
        _remove(folder)
    if group is not None:
        import torch.distributed as dist

        dist.barrier()  # leave together
        dist.destroy_process_group()


def _ranks() -> tuple[Any, int]:
    # Under torchrun all ranks have all data, and the points are shared out.
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None, 0
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return "world", dist.get_rank()


def _computed(
    files: Sequence[Path], source: Any, wanted: Wanted, folder: Path, *, quiet: bool
) -> list[Slice]:
    log, forecast = stderr(), False
    with progress_bar() as bar:
        task = bar.add_task("", total=None)

        def start(path: Path, section: Any) -> None:
            nonlocal forecast
            forecast = False
            bar.reset(task, description=path.name)
            for note in section.notes if not quiet else ():
                log.print(f"note: {note}", style="yellow", markup=False)

        def progress(at: SliceProgress) -> None:
            nonlocal forecast
            if not forecast and not quiet:
                forecast = True
                word = "at most " if wanted.options["refine"] else ""
                have = f", {at.done} of them from before" if at.done else ""
                log.print(
                    f"{at.total} points{have}, {at.seconds_a_point:.2g} s each:"
                    f" {word}{_time(at.remaining)}"
                )
            left = f"{bar.tasks[0].description.split(',')[0]}, {_time(at.remaining)} left"
            bar.update(task, total=at.total, completed=at.done, description=left)

        return slices_of(
            files,
            lambda path: source(path),
            wanted,
            parts=lambda path: folder / _folder_name(path),
            on_start=start,
            progress=progress,
        )


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _folder_name(path: Path) -> str:
    # Checkpoints of several runs are often called alike.
    return f"{path.stem}-{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"


def _remove(folder: Path) -> None:
    for own in folder.glob("*/"):
        remove_parts(own)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _check_output(path: Path) -> None:
    if path.suffix.lower() not in (*FIGURES, *DATA, *PAGES):
        raise SettingsError(
            f"Expected an output that ends in {' '.join((*FIGURES, *PAGES, *DATA))}. Got {path}."
        )
    if not path.parent.is_dir():
        raise SettingsError(f"Expected the folder {path.parent} to exist. Make it first.")
    if path.suffix.lower() in PAGES:
        import importlib.util

        if importlib.util.find_spec("plotly") is None:
            raise SettingsError(
                "Expected plotly, which draws the interactive page. It is not installed. Use: pip"
                " install sharpkit[plots]"
            )


def _beside(outputs: Sequence[Path]) -> Path | None:
    # Where the data are saved that nobody asked for.
    if not outputs or any(p.suffix.lower() == ".npz" for p in outputs):
        return None
    return outputs[0].with_suffix(".npz")


def _check_beside(outputs: Sequence[Path], count: int) -> None:
    # What is there is only written over if it is a slice.
    if (beside := _beside(outputs)) is None:
        return
    for i in range(1, count + 1):
        path = _numbered(beside, count, i)
        if not path.exists():
            continue
        try:
            load_slice(path)
        except SettingsError:
            raise SettingsError(
                f"Expected to save the data beside the figure, in {path}. There is another file"
                " of this name. Move it, or give -o FILE.npz too."
            ) from None


def _numbered(path: Path, count: int, number: int) -> Path:
    return path if count == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")


def _write(
    found: list[Slice],
    outputs: Sequence[Path],
    show: str | None,
    surface: bool,
    linear: bool,
    *,
    data: bool,
) -> None:
    out = stdout()
    written: list[Path] = []
    if data and (beside := _beside(outputs)) is not None:  # first: a figure may fail
        for i, one in enumerate(found, 1):
            written.append(one.save(_numbered(beside, len(found), i)))
    for path in outputs:
        suffix = path.suffix.lower()
        if suffix in DATA:
            for i, one in enumerate(found, 1):
                written.append(save_slice(one, _numbered(path, len(found), i), name=show))
        elif suffix in PAGES:
            from sharpkit.plots import interactive_page

            written.append(interactive_page(found, path))
        else:
            written.append(_figure(found, path, show, surface, linear))
    for one in found:
        _tell(one)
    for path in written:
        out.print(Text(f"{path} written"))


def _figure(found: list[Slice], path: Path, show: str | None, surface: bool, linear: bool) -> Path:
    from sharpkit import plots

    if len(found) > 1:
        axes = plots.plot_slices(
            found,
            show,
            kind="surface" if surface else "contour",
            log=None if not linear else False,
            caption=True,
        )[0]
    elif found[0].dim == 1:
        axes = plots.plot_line(found[0], [show] if show else None, caption=True)
    elif surface:
        axes = plots.plot_surface(found[0], show, log=not linear, caption=True)
    else:
        axes = plots.plot_contour(found[0], show, log=not linear, caption=True)
    return plots.save_figure(axes, path)


def _tell(one: Slice) -> None:
    out = stdout()
    out.print(Text(caption(one)))
    counts = {s: int((one.status == s).sum()) for s in Status}
    words = ", ".join(f"{n} {s.name.lower().replace('_', ' ')}" for s, n in counts.items() if n)
    out.print(Text(f"{one.status.size} points: {words}; {one.cost.seconds:.1f} s"))
    for name in one.names:
        values = one[name]
        if not np.isfinite(values).any():
            out.print(Text(f"{name}: nothing finite", style="red"))
            continue
        low = np.unravel_index(np.nanargmin(values), values.shape)
        at = ", ".join(f"{g[i]:.3g}" for g, i in zip(one.grid, low, strict=True))
        text = f"{name}: from {np.nanmin(values):.4g} (at {at}) to {np.nanmax(values):.4g}"
        out.print(Text(text))
    for note in one.notes:
        stderr().print(f"note: {note}", style="yellow", markup=False)


# -- path --------------------------------------------------------------------------------


def measure_path(
    first: Annotated[Path, typer.Argument(help="Checkpoint of one end.")],
    second: Annotated[Path, typer.Argument(help="Checkpoint of the other end.")],
    recipe: RecipeOption,
    output: Annotated[
        list[Path] | None,
        typer.Option(
            "-o", "--output", help="Figure (.png .pdf .svg) or table (.csv .json); may be repeated."
        ),
    ] = None,
    align: Annotated[
        str | None,
        typer.Option("--align", help="First bring the ends together: permutation,scale,gl."),
    ] = None,
    connect: Annotated[
        str | None, typer.Option("--connect", help="Train a curve: bezier or polychain.")
    ] = None,
    bends: Annotated[int, typer.Option(help="Bends of the curve.")] = 1,
    epochs: Annotated[int, typer.Option(help="Epochs of its training.")] = 30,
    lr: Annotated[float, typer.Option(help="Learning rate of its training.")] = 0.05,
    batch_size: Annotated[
        int | None, typer.Option(help="Examples of a step; default the recipe's batches.")
    ] = None,
    points: Annotated[int, typer.Option("-t", help="Points along each path.")] = 25,
    test: Annotated[bool, typer.Option("--test", help="On the recipe's test_data() too.")] = False,
    batch_norm: Annotated[
        str, typer.Option("--batch-norm", help="Running statistics: reestimate, refuse or keep.")
    ] = "reestimate",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of matching and training.")] = 0,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    params: ParamsOption = None,
    trust_pickle: TrustOption = False,
) -> None:
    """Measure the barrier between two checkpoints: straight, aligned, along a trained curve."""
    from sharpkit.study.pathing import PathRequest, write_paths

    outputs = output or []
    for path in outputs:
        if path.suffix.lower() not in (*FIGURES, ".csv", ".json"):
            raise SettingsError(
                f"Expected an output that ends in {' '.join(FIGURES)} .csv .json. Got {path}."
            )
        if not path.parent.is_dir():
            raise SettingsError(f"Expected the folder {path.parent} to exist. Make it first.")
    request = PathRequest(
        align=tuple(a.strip() for a in align.split(",")) if align else (),
        connect=connect,
        bends=bends,
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        points=points,
        batch_norm=batch_norm,
        seed=seed,
    )
    request.check()
    source = partial(
        Source,
        recipe,
        dtype=read_dtype(dtype),
        device=read_device(device),
        params=tuple(params) if params else None,
        trust_pickle=trust_pickle,
        test=test,
    )
    log = stderr()
    found = request.measure(
        source(first), source(second), lambda text: log.print(text, markup=False)
    )
    if as_json:
        sys.stdout.write(json.dumps(found.to_dict(), indent=2, allow_nan=False) + "\n")
    else:
        shown = found.table().map(lambda v: f"{v:.4g}" if isinstance(v, float) else v)
        stdout().print(frame_table(f"From {first.name} to {second.name}", shown))
    for note in found.notes:
        log.print(f"note: {note}", style="yellow", markup=False)
    for path in outputs:
        if path.suffix.lower() in FIGURES:
            from sharpkit import plots

            plots.save_figure(plots.plot_line(found.slices(), caption=True), path)
        else:
            write_paths(found, path)
        log.print(f"{path} written", markup=False)
