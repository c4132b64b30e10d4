"""`params.yaml`, read once, typed, with every mistake reported together."""

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError
from pydantic_core import ErrorDetails

from stages.data.config import DataConfig, ViewsConfig
from stages.extract.config import ExtractConfig, TeacherConfig
from stages.train.config import PhaseConfig, RuntimeConfig, StudentConfig


class ParamsError(ValueError):
    """The parameter file is missing, is no YAML, or holds values that are not accepted."""


class Params(BaseModel):
    """Everything a person may set; one field per section of `params.yaml`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    image_size: tuple[PositiveInt, PositiveInt]
    """Height and width in pixels of the view that teachers and student share."""
    data: DataConfig
    """Where the images and labels are."""
    views: ViewsConfig = ViewsConfig()
    """How many versions of each image there are, and what may differ between them."""
    tasks: tuple[str, ...]
    """Tasks the student is trained on; each must exist in the data, empty for unlabelled images."""
    store: str = Field(min_length=1)
    """Folder of the feature store, or a URL such as `s3://bucket/features.zarr`."""
    runs: Path
    """Folder that receives one sub-folder per training run."""
    report: Path
    """Folder for metrics, tables and pictures."""
    teachers: dict[str, TeacherConfig] = Field(min_length=1)
    """Frozen encoders by name; the name is the folder in the store."""
    extract: ExtractConfig
    """Stage one: batch size, shard size, device."""
    student: StudentConfig
    """The network that is trained."""
    runtime: RuntimeConfig
    """Device, precision and seed of training and evaluation."""
    distill: PhaseConfig
    """Phase one of training: stored targets only."""
    multitask: PhaseConfig
    """Phase two: labels, plus stored targets with weight `alpha`."""


def load_params(path: Path) -> Params:
    """Read and validate a parameter file.

    Raises
    ------
    ParamsError
        With one line per mistake: where it is, what was expected, what was got.
    """
    if not path.exists():
        raise ParamsError(
            f"no parameter file at {path}; run from the project's folder, or name one with --params"
        )
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ParamsError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ParamsError(f"{path} must hold a mapping of sections, got {type(values).__name__}")
    try:
        # Validated as JSON: there strict mode still takes a list for a tuple and text for a path.
        return Params.model_validate_json(json.dumps(values))
    except ValidationError as error:
        schema = Params.model_json_schema()
        lines = [_describe(details, schema) for details in error.errors()]
        raise ParamsError(f"{path} has {len(lines)} mistake(s):\n" + "\n".join(lines)) from error
    except TypeError as error:
        raise ParamsError(
            f"{path} holds a value that YAML reads as a date or set: {error}"
        ) from error


def _describe(details: ErrorDetails, schema: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in details["loc"])
    got = details["input"]
    if details["type"] == "extra_forbidden":
        known = _known_names(schema, details["loc"][:-1])
        near = difflib.get_close_matches(str(details["loc"][-1]), known, n=1, cutoff=0.5)
        advice = f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(known)}"
        return f"  {where}: unknown key; {advice}"
    if where == "teachers":
        return (
            f"  teachers: name at least one, got {got!r}; for example\n"
            '    teachers: {dinov2: {source: "timm:vit_base_patch14_dinov2.lvd142m"}}\n'
            "  (`sak teachers` lists more)"
        )
    if details["type"] == "missing":
        return f"  {where}: missing"
    message = f"  {where}: {details['msg']}, got {got!r}"
    if details["type"] == "float_type" and isinstance(got, str):
        message += " (YAML reads 1e-3 as text: write 1.0e-3)"
    return message


def _known_names(schema: Mapping[str, Any], location: tuple[int | str, ...]) -> list[str]:
    """Names accepted at a location, found by walking the JSON schema of `Params`."""
    node: Mapping[str, Any] = schema
    for part in location:
        node = _resolve(schema, node)
        mapping = node.get("discriminator", {}).get("mapping", {})
        if part in mapping:
            node = {"$ref": mapping[part]}
        elif part in node.get("properties", {}):
            node = node["properties"][part]
        else:
            node = node.get("additionalProperties") or {}
    return sorted(_resolve(schema, node).get("properties", {}))


def _resolve(schema: Mapping[str, Any], node: Mapping[str, Any]) -> Mapping[str, Any]:
    for option in node.get("anyOf", ()):  # what may be null, too
        if "$ref" in option:
            node = option
    reference = node.get("$ref")
    return schema["$defs"][reference.rsplit("/", 1)[-1]] if reference else node
