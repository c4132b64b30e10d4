"""What a person may set for the student and its training; checked before any weight is made."""

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

_Triple = Annotated[tuple[float, float, float], Field(strict=False)]
_Positive = Annotated[float, Field(gt=0)]
_Deviations = Annotated[tuple[_Positive, _Positive, _Positive], Field(strict=False)]
RESERVED_MODEL_ARGS = frozenset({"img_size", "dynamic_img_size", "num_classes", "pretrained"})


class _Config(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )


class StudentConfig(_Config):
    """The student: a timm ViT as stem, plus what is added to it."""

    model: str
    """Name of a timm VisionTransformer, e.g. `vit_base_patch16_384`."""
    model_args: dict[str, Any] = {}
    """Extra arguments of that model, e.g. `{patch_size: 8, embed_dim: 96}`."""
    levels: Annotated[int, Field(ge=1)] | Annotated[tuple[int, ...], Field(strict=False)] = 4
    """Number of evenly spaced blocks that are tapped, or their zero-based indices."""
    adapter_ratio: int = Field(default=4, ge=1)
    """Stem width over the hidden width of an adapter."""
    router: Literal["sak", "sak-noiseless", "sum"] = "sak"
    """`sak`: Mixture-of-Representations with noise in training; `sak-noiseless`: without it; `sum`:
    plain sum of the experts (ablation)."""
    mean: _Triple | None = None
    """Per-channel mean of the pixels, scaled to 0..1; default: what timm states for the model."""
    std: _Deviations | None = None
    """Per-channel standard deviation of the pixels, scaled to 0..1; default: timm's."""
    pretrained: bool = False
    """Start the stem from timm's weights on the Hugging Face hub."""
    checkpoint: Path | None = Field(default=None, strict=False)
    """Start the stem from this file (safetensors, or a torch state dict)."""

    @field_validator("model_args")
    @classmethod
    def _no_reserved_argument(cls, value: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(RESERVED_MODEL_ARGS & value.keys()):
            raise ValueError(f"{taken} are set by the project itself; remove them")
        return value

    @field_validator("levels")
    @classmethod
    def _ascending_levels(cls, value: int | tuple[int, ...]) -> int | tuple[int, ...]:
        if isinstance(value, tuple):
            ascending = all(low < high for low, high in pairwise(value))
            if not value or value[0] < 0 or not ascending:
                raise ValueError(f"expected ascending zero-based block indices, got {list(value)}")
        return value


class ReuseConfig(_Config):
    """Changes of stored views whose stored grids are changed alike, though the teacher would answer
    otherwise: only where every level's measured cosine is at least the number given."""

    flip: float | None = Field(default=None, gt=0, le=1)
    """Mirror an image with probability one half. Needs this mean cosine under `flip`."""
    crop: float | None = Field(default=None, gt=0, le=1)
    """Show a part of each image, half of its sides to all. Needs this under `crop` and `scale`."""

    @property
    def asked(self) -> bool:
        """Whether anything is changed."""
        return self.flip is not None or self.crop is not None


class PhaseConfig(_Config):
    """One training phase, `distill` or `multitask`."""

    steps: int = Field(ge=1)
    """Optimiser steps of the whole run; the schedule ends here."""
    batch_size: int = Field(default=16, ge=1)
    """Images per step, of all processes together."""
    accumulate: int = Field(default=1, ge=1)
    """Parts that each process's share of a step is computed in, one after the other, to save
    memory. The gradient is the mean of the parts'; means over labelled pixels, batch
    normalisation and the routers' noise are of a part at a time."""
    learning_rate: float = Field(gt=0)
    """Peak learning rate."""
    learning_rate_start: float = Field(default=1.25e-7, ge=0)
    """Learning rate of the first warm-up step."""
    learning_rate_min: float = Field(default=0.0, ge=0)
    """Learning rate at the end of the cosine schedule (the polynomial one ends at 0)."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW's decoupled weight decay, on all parameters."""
    schedule: Literal["cosine", "poly"] = "cosine"
    """Shape after warm-up, per step: half cosine, or (1 - progress) ** 0.9."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up."""
    gradient_clip: float | None = Field(default=None, gt=0)
    """Largest allowed norm of the gradient; none means no clipping."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Keep an exponential moving average of the weights, e.g. 0.999, and save it as the student."""
    trainable: Literal["all", "frozen-stem", "lora-stem", "routers"] = "all"
    """What learns: everything; all but the stem; all but the stem, which gets low-rank changes;
    or routers and heads alone."""
    lora_rank: int = Field(default=8, ge=1)
    """Rank of the stem's changes with `trainable: lora-stem`; merged into the saved student."""
    alpha: float = Field(default=1.0, ge=0)
    """Weight of the distillation loss; 0 trains without teachers' features."""
    jitter: bool = True
    """Photometric jitter of the student's image; teachers saw the clean one."""
    resolution: Literal["finest"] | Annotated[tuple[int, int], Field(strict=False)] = "finest"
    """Grid of the targets: the finest that is stored of each level, or the finest that is not
    larger than [height, width]."""
    targets: Literal["cached", "online"] = "cached"
    """`cached` reads features from the store; `online` runs the teachers live on the same views."""
    reuse: ReuseConfig = ReuseConfig()
    """Further changes of the stored views, for student and stored grids; off by default."""
    shuffle_window: int = Field(default=64, ge=1)
    """Shards of the store whose images are shuffled together: more mixes better, less lets a disk
    read in sequence; as many as there are shards is a plain permutation."""
    teachers_per_image: int | None = Field(default=None, ge=1)
    """Teachers drawn for each image and epoch, whose targets alone are read; the loss is weighted
    to have the same expectation. None asks all of them."""
    log_every: int = Field(default=20, ge=1)
    """Steps averaged in one row of `log.csv`."""
    checkpoint_every: int = Field(default=200, ge=1)
    """Steps between checkpoints; the last step always writes one."""
    keep_last: int = Field(default=2, ge=1)
    """Newest checkpoints that are kept; a damaged one is replaced by the one before."""
    keep_best: str | None = None
    """Also keep the checkpoint with the lowest value in this column of `log.csv`, e.g. `loss`."""
    workers: int = Field(default=0, ge=0)
    """Processes that load data; 0 loads in the training process."""
    cache_megabytes: int = Field(default=1024, ge=0)
    """Memory per loading process for decoded images and labels; 0 decodes every time."""

    @model_validator(mode="after")
    def _reuse_is_of_stored_grids(self) -> "PhaseConfig":
        if self.targets == "online" and self.reuse.asked:
            raise ValueError(
                "reuse changes stored grids, targets: online has none; leave one of them out "
                "(`views: {count: 4}` shows teachers and student changed images)"
            )
        return self

    @field_validator("accumulate")
    @classmethod
    def _equal_parts(cls, value: int, info: Any) -> int:
        whole = info.data.get("batch_size", 0)
        if whole % value:
            raise ValueError(f"expected a divisor of batch_size {whole}")
        return value


class RuntimeConfig(_Config):
    """Where and how to compute."""

    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"
    """`auto` (a GPU when there is one), or a torch device such as `cpu` or `cuda:1`."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of the forward pass; weights and losses stay float32."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of weights, order of images, jitter and router noise."""
    compile: bool = False
    """Let `torch.compile` make the student faster; its first step takes minutes."""
    activation_checkpointing: bool = False
    """Compute the stem's blocks a second time in the backward pass instead of keeping what they
    made: less memory, about a third more time, the same gradients."""
    trackers: Annotated[
        tuple[Literal["dvclive", "tensorboard", "wandb"], ...], Field(strict=False)
    ] = ()
    """Where the rows of `log.csv` also go; each is an optional extra of this package."""
