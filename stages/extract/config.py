"""What a person sets about teachers and about their extraction; read by the command line."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema

from store.codecs import parse_codec

_Triple = Annotated[tuple[float, float, float], Field(strict=False)]
_Positive = Annotated[float, Field(gt=0)]
_Deviations = Annotated[tuple[_Positive, _Positive, _Positive], Field(strict=False)]
_Size = Annotated[
    tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]], Field(strict=False)
]


def _known_codec(name: str) -> str:
    parse_codec(name)
    return name


def _batch_size(value: object) -> object:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError("a number of images, at least 1, or auto")


_BatchSize = Annotated[
    int | Literal["auto"],
    PlainValidator(_batch_size),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"const": "auto"}]}),
]
"""One validator for both, so that a mistake is reported at the setting itself."""


class TeacherConfig(BaseModel):
    """One frozen teacher: which network, which weights, what it sees and what is kept."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )

    source: Annotated[str, Field(pattern=r"^(timm|open_clip|custom):[^\s/]+(/[^\s/]+)?$")]
    """`timm:<model>[.tag]`, or `open_clip:<model>/<tag>` (the tag may go when `checkpoint` is set),
    or a class of your own: `custom:<name>`, an entry point of the group `sak.teachers`, or
    `custom:<module>:<Class>`; `stages.extract.custom.CustomTeacher` says what it must be."""

    checkpoint: Literal["random"] | Annotated[Path, Field(strict=False)] | None = None
    """Local weights: safetensors, or any file that torch.load(weights_only=True) reads. Without it
    the library downloads its own from the Hugging Face hub. `random` builds seeded random weights,
    for tests and timings only."""

    model_args: dict[str, Any] = {}
    """Arguments for the library's constructor, such as `output_stride: 16`. `img_size` is the size
    that the checkpoint was trained at, where that differs from the model's own."""

    levels: (
        Annotated[int, Field(ge=1)] | Annotated[tuple[int, ...], Field(strict=False, min_length=1)]
    ) = 4
    """How many levels (evenly spaced blocks of a transformer, the last stages of a hierarchical
    network), or the zero-based indices of blocks or stages, ascending."""

    input_size: Literal["view", "native"] | _Size = "view"
    """What the network sees: `view` = the student's view, resized to the nearest multiple of the
    patch or stride; `native` = the model's own size, aspect kept, padding cut from the grid;
    or [height, width] in pixels, rounded likewise."""

    mean: _Triple | None = None
    """Per-channel mean of the pixels, scaled to 0..1; default: what the library states."""

    std: _Deviations | None = None
    """Per-channel standard deviation of the pixels, scaled to 0..1; default: the library's."""

    interpolation: Literal["bilinear", "bicubic", "lanczos"] | None = None
    """How images are resized; default: what the library states."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the network; how features are stored is the codec's matter."""

    compile: bool = False
    """Run the network through torch.compile: faster where it is extracted from for long, other
    features in the last bits. Needs a C++ compiler (on CUDA, Triton); batches are padded to powers
    of two, so choose such a `batch_size:`."""

    codec: Annotated[str, AfterValidator(_known_codec)] = "float16"
    """How features are stored: float32, float16, int8, int8-hadamard, int8-pca, int8-pcaK, or
    pca-Bbit (B from 1 to 6). What it costs is measured and shown by `sak plan` and `sak inspect`."""

    resolutions: Annotated[
        tuple[Literal["native"] | _Size, ...], Field(strict=False, min_length=1)
    ] = ("native",)
    """Grids to store of every level: `native`, or [height, width] that finer ones are
    area-averaged to (a level that is coarser keeps its own)."""

    def asked(self) -> dict[str, Any]:
        """Return the settings as the store keeps them: JSON, a checkpoint by its file's name."""
        asked = self.model_dump(mode="json")
        if not self.compile:
            del asked["compile"]  # stores older than this setting do not name it
        if self.checkpoint is not None:
            asked["checkpoint"] = Path(self.checkpoint).name
        return asked


class ExtractConfig(BaseModel):
    """How extraction runs; nothing here changes what the features are, batch size aside."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )

    batch_size: _BatchSize = 16
    """Images per forward pass, or `auto`: doubled for each teacher while that makes it faster and
    fits into memory. Another size may change features in the last bits."""

    calibration_images: Annotated[int, Field(ge=2)] = 320
    """Images that codecs are fitted to, every fifth of them only to measure what is lost."""

    shard_megabytes: Annotated[int, Field(ge=1)] = 256
    """Mean size of a shard file in MiB: the unit that is written, resumed and checked as a whole."""

    covariance: bool = False
    """Gather the covariance of each level's channels while extracting, which PHI-S and whitening
    need; z-score does not. Costs one matrix product per image and level, and C (C + 1) / 2 numbers
    of 8 bytes per level and shard (2.4 MB for 768 channels)."""

    equivariance_images: Annotated[int, Field(ge=0)] = 16
    """Images on which is measured how far each level follows flips, crops and scale, five forward
    passes each (more where a network's grids do not nest); 0 leaves it out."""

    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"
    """`auto` takes a CUDA device where there is one; else `cpu`, `cuda`, `cuda:1`, `mps`."""

    @property
    def sample_batch_size(self) -> int:
        """Images per forward pass where only a few images are looked at."""
        return 8 if self.batch_size == "auto" else self.batch_size
