"""What a person may say about their images in `params.yaml`."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class _ImageSetConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    max_bad: float = Field(default=0.001, ge=0, le=1)
    """Share of the images that may be unreadable (0.001 = 0.1 %); the count is rounded up."""


class FolderData(_ImageSetConfig):
    """Unlabelled images below one folder."""

    kind: Literal["folder"]
    root: Path = Field(strict=False)
    """Folder that is searched for images, its subfolders included."""


class ManifestData(_ImageSetConfig):
    """Unlabelled images listed in a table with a column `path` and, optionally, `id`."""

    kind: Literal["manifest"]
    path: Path = Field(strict=False)
    """CSV or Parquet file."""
    root: Path | None = Field(default=None, strict=False)
    """Folder that relative image paths start from; the manifest's own folder when left out."""


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
    FolderData | ManifestData | NyudData | ScenesData, Field(discriminator="kind")
]
