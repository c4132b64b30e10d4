"""`sak teachers`: what is known; `sak teachers check`: whether one does what extraction needs."""

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pipeline import console
from pipeline.options import DEFAULT_PARAMS, AsJson, ParamsFile


class ListingGroup(TyperGroup):
    """Lists where no command follows."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put `list` first where there are options only."""
        if "--help" not in args and (not args or args[0].startswith("-")):
            args = ["list", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=ListingGroup,
    help="List teachers, which is what it does alone, or try one.",
    epilog="Example: sak teachers --json",
)


@app.command("list", epilog="Example: sak teachers")
def list_teachers(params: ParamsFile = DEFAULT_PARAMS, as_json: AsJson = False) -> None:
    """List teachers by name, with the line that asks for each in the parameter file."""
    from pipeline import tables

    console.show("teachers", tables.teachers(params), as_json)


@app.command(epilog="Example: sak teachers check my_package:MyTeacher; exit code 3: a check failed")
def check(
    teacher: Annotated[
        str,
        typer.Argument(
            help="A teacher of the parameter file, a source such as timm:resnet18 (then with random "
            "weights), or your own class: module:Class, or the name of its entry point."
        ),
    ],
    size: Annotated[
        list[str] | None,
        typer.Option(help="HEIGHTxWIDTH of views to try; may be repeated. 224x224 and 192x320."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    params: ParamsFile = DEFAULT_PARAMS,
    as_json: AsJson = False,
) -> None:
    """Try a teacher on made-up images: shapes, determinism, batches, geometry, description."""
    from pipeline import teacher_check

    with console.progress_bar(not as_json) as bar:
        result, passed = teacher_check.check(teacher, size or [], device, params, bar)
    console.show(f"teacher {teacher}", result, as_json)
    if not passed:
        raise typer.Exit(3)
