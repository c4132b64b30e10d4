"""What a person may say about their images in `params.yaml`."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)

from stages.data.places import Url, address

_Share = Annotated[float, Field(gt=0, le=1)]


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


class PhotometricConfig(BaseModel):
    """How far the colours of drawn views may be from those of the image."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    brightness: float = Field(default=0.0, ge=0, le=1)
    """Factors are drawn from 1 - this to 1 + this; so with contrast and saturation."""
    contrast: float = Field(default=0.0, ge=0, le=1)
    saturation: float = Field(default=0.0, ge=0, le=1)
    hue: float = Field(default=0.0, ge=0, le=0.5)
    """Largest shift of the hue either way, in turns of the colour circle."""

    @model_validator(mode="after")
    def _changes_something(self) -> "PhotometricConfig":
        if not (self.brightness or self.contrast or self.saturation or self.hue):
            raise ValueError("photometric changes nothing; set a range above 0, or leave it out")
        return self


class ViewsConfig(BaseModel):
    """The views of each image, which teachers and student see alike; drawn by `sak index`.

    View 0 is the whole image, cut to the shape of `image_size`; the others are drawn as said here,
    each from the seed, the image's id and the view's number alone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    count: int = Field(default=1, ge=1, le=1024)
    """Views per image. The store grows with it; 1 is the whole image alone."""
    area: tuple[_Share, _Share] = Field(default=(0.25, 1.0), strict=False)
    """Smallest and largest share of view 0's area that a crop covers, anywhere in the image."""
    aspect: float = Field(default=1.0, ge=1, le=4)
    """How many times taller or wider a crop may be than the view's shape, which it is stretched to;
    1 keeps the shape."""
    flip: float = Field(default=0.5, ge=0, le=1)
    """Probability that a view is mirrored left to right."""
    photometric: PhotometricConfig | None = None
    """Changes of colour that teachers see too. Left out, they see clean pixels, and the student's
    own `jitter` is all there is."""
    depth: Literal["metric", "scaled"] = "metric"
    """Depth labels of crops: metres as they are, or divided by how much larger the crop shows than
    view 0. Concerns training alone, not what is stored."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Another seed draws other views."""

    @model_validator(mode="after")
    def _ascending_area(self) -> "ViewsConfig":
        low, high = self.area
        if low > high:
            raise ValueError(f"area is [smallest, largest], got [{low}, {high}]")
        return self


DataConfig = Annotated[
    FolderData | ManifestData | WebDatasetData | NyudData | ScenesData, Field(discriminator="kind")
]
