"""What a person may say about their images in `params.yaml`."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator, WithJsonSchema

from stages.data.places import Url, address


def _address(value: object) -> Path | Url:
    if not isinstance(value, str | Path | Url) or not str(value):
        raise ValueError("a path or a URL is wanted")
    return address(value)


_Address = Annotated[
    Path | Url,
    PlainValidator(_address),
    PlainSerializer(str),
    WithJsonSchema({"type": "string", "format": "path"}),
]


class _ImageSetConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    max_bad: float = Field(default=0.001, ge=0, le=1)
    """Share of the images that may be unreadable (0.001 = 0.1 %); the count is rounded up."""


class FolderData(_ImageSetConfig):
    """Unlabelled images below one folder."""

    kind: Literal["folder"]
    root: _Address
    """Folder that is searched for images, its subfolders included; or a URL such as `s3://b/x`."""


class ManifestData(_ImageSetConfig):
    """Unlabelled images listed in a table with a column `path` (or URL) and, optionally, `id`."""

    kind: Literal["manifest"]
    path: Path = Field(strict=False)
    """CSV or Parquet file."""
    root: _Address | None = None
    """Folder or URL that relative image paths start from; the manifest's own when left out."""


class WebDatasetData(_ImageSetConfig):
    """Unlabelled images in tars, as the webdataset library writes them."""

    kind: Literal["webdataset"]
    shards: Annotated[tuple[str, ...], Field(strict=False, min_length=1)]
    """Paths or URLs of tars that are not compressed, with `*` or ranges such as `{000..099}`."""
    index: Path = Field(strict=False)
    """Parquet file that `sak index` makes: where in its tar each image lies."""
    suffixes: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Suffixes of the images, such as `.jpg`, where a sample has other pictures beside its image;
    all that images have when left out."""


class NyudData(_ImageSetConfig):
    """NYUD-v2 in its published multi-task layout."""

    kind: Literal["nyud"]
    root: Path = Field(strict=False)
    """Folder with `images/ segmentation/ edge/ normals/ depth/ gt_sets/`."""


class ScenesData(_ImageSetConfig):
    """Rendered indoor scenes with exact labels for all six tasks."""

    kind: Literal["scenes"]
    root: Path = Field(strict=False)
    """Folder the scenes are rendered into and read from."""
    train: int = Field(ge=1)
    """Number of training scenes."""
    val: int = Field(ge=1)
    """Number of validation scenes."""
    seed: int = Field(default=0, ge=0)
    """Seed of the generator; another seed gives other scenes."""


DataConfig = Annotated[
    FolderData | ManifestData | WebDatasetData | NyudData | ScenesData, Field(discriminator="kind")
]
