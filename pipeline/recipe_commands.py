"""`sak recipes`: what there is to start from; `sak recipes show`: one of them as a file."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline import console
from pipeline.options import AsJson
from pipeline.teacher_commands import ListingGroup

app = typer.Typer(
    cls=ListingGroup,
    help="List recipes, which is what it does alone, or write one.",
    epilog="Example: sak recipes --json",
)


@app.command("list", epilog="Example: sak recipes")
def list_recipes(as_json: AsJson = False) -> None:
    """List recipes with their data, teachers, commands, time and disk."""
    from pipeline import recipes

    console.show("recipes", recipes.listing(), as_json)


@app.command(epilog="Example: sak recipes show nyud --size LB --output params.yaml")
def show(
    name: Annotated[str, typer.Argument(help="Name of a recipe.")],
    size: Annotated[
        str | None, typer.Option(help="Teachers' size, then the student's: BB, BS, LB or LL.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="New file to write; standard output if left out.")
    ] = None,
) -> None:
    """Write a recipe as a parameter file."""
    from pipeline.recipes import RecipeError, recipe

    text = recipe(name).at(size)
    if output is None:
        typer.echo(text, nl=False)
    elif output.exists():
        raise RecipeError(f"{output} exists; choose another file, or remove it first")
    else:
        output.write_text(text)
