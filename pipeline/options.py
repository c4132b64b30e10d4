"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

ParamsFile = Annotated[Path, typer.Option("--params", help="Parameter file.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, no table.")]
DEFAULT_PARAMS = Path("params.yaml")
