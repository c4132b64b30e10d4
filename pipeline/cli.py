"""The `sak` command: every function loads the parameters, calls one step and shows its result."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from pipeline import console, recipe_commands, reference_commands, teacher_commands
from pipeline.mistakes import GuardedGroup
from pipeline.options import DEFAULT_PARAMS, AsJson, ParamsFile
from pipeline.report import two_columns
from stages.memory import keep_freed_memory

app = typer.Typer(
    name="sak",
    cls=GuardedGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Distil several frozen vision models into one student, through a store of their features.",
    epilog="Exit codes: 0 done, 1 a fault of ours, 2 a mistake in the input, 3 verify or doctor found "
    "something, 130 interrupted, 143 terminated (SIGTERM); both resume.",
)

app.add_typer(teacher_commands.app, name="teachers")
reference_commands.add_to(app)
app.add_typer(recipe_commands.app, name="recipes")


@app.callback()
def prepare() -> None:
    """Do what every command wants done before tensors are made."""
    keep_freed_memory()


@app.command(epilog="Example: sak index --max-bad 0.1%")
def index(
    append: Annotated[
        bool, typer.Option("--append", help="Add the images that the store does not list yet.")
    ] = False,
    retry_quarantined: Annotated[
        bool, typer.Option("--retry-quarantined", help="Let images in that can be read by now.")
    ] = False,
    max_bad: Annotated[
        str | None, typer.Option(help="Bad images to accept: 30 or 0.1%; else data.max_bad.")
    ] = None,
    params: ParamsFile = DEFAULT_PARAMS,
    as_json: AsJson = False,
) -> None:
    """List and check the images, render them first for the scenes recipe, and open the store."""
    from pipeline import indexing
    from pipeline.params import load_params

    if retry_quarantined and (append or max_bad):
        raise typer.BadParameter("--retry-quarantined goes alone; run it before --append")
    with console.progress_bar(not as_json) as bar:
        loaded = load_params(params)
        if retry_quarantined:
            result = indexing.retry_quarantined(loaded, bar)
        else:
            result = indexing.index(loaded, append, bar, max_bad)
    console.show("image set", two_columns(dataclasses.asdict(result)), as_json)


@app.command(epilog="Example: sak plan --budget 500GB; exit code 2: it does not fit the disk")
def plan(
    budget: Annotated[
        str | None,
        typer.Option(help="Bytes for the whole store, e.g. 500GB: choose codec and resolution."),
    ] = None,
    price_per_gb_month: Annotated[
        float | None, typer.Option(min=0, help="What storing a GB costs a month.")
    ] = None,
    price_per_hour: Annotated[
        float | None, typer.Option(min=0, help="What an hour of this machine costs.")
    ] = None,
    images: Annotated[
        int | None, typer.Option(min=1, help="Plan for so many images, not those listed.")
    ] = None,
    measure_images: Annotated[
        int, typer.Option(min=2, help="Images to measure on; more measure the codecs better.")
    ] = 32,
    epochs: Annotated[
        float | None,
        typer.Option(min=0, help="Epochs to compare with online teachers; else those of distill."),
    ] = None,
    params: ParamsFile = DEFAULT_PARAMS,
    as_json: AsJson = False,
) -> None:
    """Say, from a few measured images, what extraction takes: bytes, time, price, codec."""
    from pipeline import planning
    from pipeline.params import load_params
    from pipeline.plan_budget import parse_size
    from pipeline.plan_survey import PlanRequest

    request = PlanRequest(
        measure_images=measure_images,
        budget=None if budget is None else parse_size(budget),
        price_per_gb_month=price_per_gb_month,
        price_per_hour=price_per_hour,
        images=images,
        epochs=epochs,
    )
    with console.progress_bar(not as_json) as bar:
        result = planning.plan(load_params(params), request, bar)
    for title, report in result.tables[:1] if as_json else result.tables:
        console.show(title, report, as_json)
    if not result.fits:
        raise typer.Exit(2)


@app.command(
    "extract-teachers",
    epilog="Example: sak extract-teachers dinov2 clip --workers 2; or dask scheduler, dask worker "
    "tcp://head:8786 --nthreads 1 on each machine, sak extract-teachers --scheduler tcp://head:8786",
)
def extract_teachers(
    names: Annotated[
        list[str] | None, typer.Argument(help="Teachers of the parameter file; all when left out.")
    ] = None,
    replace: Annotated[
        bool, typer.Option(help="Delete features that were written under other settings.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Worker processes here; one per GPU, if there are.")
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="Address of a dask scheduler whose workers do the work.")
    ] = None,
    together: Annotated[
        bool, typer.Option(help="One pass: each image is decoded once for all these teachers.")
    ] = False,
    params: ParamsFile = DEFAULT_PARAMS,
    as_json: AsJson = False,
) -> None:
    """Stage one: run each frozen teacher once over every image and write its features."""
    from pipeline import extraction
    from pipeline.params import load_params

    with console.progress_bar(not as_json) as bar:
        result = extraction.extract_teachers(
            load_params(params), names or [], replace, bar, workers, scheduler, together
        )
    console.show("extracted teachers", result, as_json)


@app.command(
    "train-student",
    epilog="Example: sak train-student distill; on 4 GPUs: torchrun --nproc-per-node 4 --no-python "
    "sak train-student distill",
)
def train_student(
    phase: Annotated[
        str, typer.Argument(help="distill, multitask, baseline (no distillation) or single-task.")
    ],
    task: Annotated[str | None, typer.Option(help="The task of a single-task run.")] = None,
    restart: Annotated[
        bool, typer.Option(help="Delete checkpoints of other settings and begin anew.")
    ] = False,
    initialise_from: Annotated[
        Path | None,
        typer.Option(help="Start multitask from this run or import, not from the distill run."),
    ] = None,
    replay: Annotated[
        Path | None,
        typer.Option(help="Only compute this saved step again (not-finite-*.pt) and show it."),
    ] = None,
    params: ParamsFile = DEFAULT_PARAMS,
    as_json: AsJson = False,
) -> None:
    """Stage two: train the student from the store; a killed run goes on where it stopped."""
    from pipeline import training
    from pipeline.params import load_params

    if initialise_from is not None and phase != "multitask":
        raise typer.BadParameter("--initialise-from belongs to multitask; other phases start anew")
    if replay is not None:
        terms = training.replay_step(load_params(params), phase, task, replay, initialise_from)
        console.show(f"not trained, computed again: {replay.name}", two_columns(terms), as_json)
        return
    with console.progress_bar(not as_json) as bar:
        result = training.train_student(
            load_params(params), phase, task, restart, bar, initialise_from
        )
    if result is not None:
        console.show(f"trained: {phase}", two_columns(dataclasses.asdict(result)), as_json)


@app.command(epilog="Example: sak evaluate --json")
def evaluate(params: ParamsFile = DEFAULT_PARAMS, as_json: AsJson = False) -> None:
    """Measure every finished run on the validation split and compare the runs."""
    from pipeline import evaluation
    from pipeline.params import load_params

    with console.progress_bar(not as_json) as bar:
        result = evaluation.evaluate(load_params(params), bar)
    console.show("validation", result, as_json)


@app.command(epilog="Example: sak inspect artifacts/features.zarr --json")
def inspect(
    store: Annotated[str, typer.Argument(help="Folder or URL of a feature store.")],
    quarantined: Annotated[
        bool, typer.Option("--quarantined", help="List every unusable image and why.")
    ] = False,
    picture: Annotated[
        Path | None, typer.Option(help="PNG to draw: principal components of each level.")
    ] = None,
    image: Annotated[
        list[str] | None, typer.Option(help="Id of an image to draw; may be repeated.")
    ] = None,
    params: Annotated[
        Path | None, typer.Option(help="Parameter file whose data the picture's images come from.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a store holds: teachers, levels, grids, bytes, coverage, provenance."""
    from pipeline import tables

    result = tables.quarantined(store) if quarantined else tables.inspect(store)
    if picture is None and (image or params):
        raise typer.BadParameter("--image and --params say what --picture draws; add --picture")
    if picture is not None:
        from pipeline.picture import with_picture

        result = with_picture(result, store, picture, image or [], params)
    console.show(store, result, as_json)


@app.command(epilog="Example: sak verify artifacts/features.zarr --live; exit code 3: findings")
def verify(
    store: Annotated[str, typer.Argument(help="Folder or URL of a feature store.")],
    teacher: Annotated[
        list[str] | None, typer.Option(help="Check this teacher only; may be given repeatedly.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Metadata, sizes and marks only; no features are read.")
    ] = False,
    live: Annotated[
        bool,
        typer.Option("--live", help="Compute some rows again with the parameter file's teachers."),
    ] = False,
    sample: Annotated[int, typer.Option(min=1, help="Rows per teacher that --live computes.")] = 16,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Have extract-teachers compute damaged shards again."),
    ] = False,
    params: ParamsFile = DEFAULT_PARAMS,
    as_json: AsJson = False,
) -> None:
    """Check every byte of a store, audit its features, and compare them with the live teacher."""
    from pipeline import verification
    from pipeline.params import load_params

    request = verification.LiveRequest(params=load_params(params), sample=sample) if live else None
    with console.progress_bar(not as_json) as bar:
        result, clean = verification.verify_store(store, teacher or [], quick, repair, request, bar)
    console.show(store, result, as_json)
    if not clean:
        raise typer.Exit(3)


@app.command(epilog="Example: sak gc --delete")
def gc(
    store: Annotated[
        str | None,
        typer.Argument(help="Folder or URL of a feature store; that of --params if left out."),
    ] = None,
    teacher: Annotated[
        list[str] | None, typer.Option(help="Drop this teacher, and no other; may be repeated.")
    ] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Delete what is listed.")] = False,
    params: ParamsFile = DEFAULT_PARAMS,
    as_json: AsJson = False,
) -> None:
    """List, or delete, teachers that the parameter file does not name and what killed runs left."""
    from pipeline import collecting
    from pipeline.params import load_params

    if store is None:
        result = collecting.collect_params(load_params(params), teacher or [], delete)
    else:
        result = collecting.collect(store, teacher or [], delete)
    console.show("garbage", result, as_json)


@app.command(
    epilog="Example: sak probe; sak probe classes --student artifacts/runs/distill; sak probe "
    "fidelity --student artifacts/runs/distill"
)
def probe(
    what: Annotated[
        str,
        typer.Argument(
            help="dense: linear probes of the tasks; classes: neighbours and linear probe where "
            "folders are classes; fidelity: a student's paths against their teachers; rank: RankMe."
        ),
    ] = "dense",
    student: Annotated[
        Path | None, typer.Option(help="Folder of a trained student to probe, not the store.")
    ] = None,
    params: ParamsFile = DEFAULT_PARAMS,
    as_json: AsJson = False,
) -> None:
    """Say what frozen features know, per teacher and level: of the store, or of a student."""
    from pipeline import probing
    from pipeline.params import load_params

    with console.progress_bar(not as_json) as bar:
        result = probing.probe(load_params(params), what, student, bar)
    console.show(f"probe: {what}", result, as_json)


@app.command(epilog="Example: sak doctor --json; exit code 3: a check failed")
def doctor(
    params: Annotated[
        Path | None, typer.Option(help="Parameter file; params.yaml where there is one.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Look at everything that a run needs: weights, GPU, disk, versions, images, store."""
    from pipeline import doctor

    result, healthy = doctor.diagnose(params or DEFAULT_PARAMS, wanted=params is not None)
    console.show("doctor", result, as_json)
    if not healthy:
        raise typer.Exit(3)
