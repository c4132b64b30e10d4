"""How each small teacher is made: one table of three recipes."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

Objective = Literal["masked", "contrastive", "promptable"]
Size = Annotated[tuple[PositiveInt, PositiveInt], Field(strict=False)]


class PretrainConfig(BaseModel):
    """One recipe: an encoder, an objective and a schedule."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    objective: Objective
    """What the encoder is trained to do; see the module of the same name."""
    model: str
    """timm name; its default mean and standard deviation normalise the images."""
    model_args: dict[str, Any] = {}
    """Arguments of `timm.create_model`, needed again to load the weights."""
    image_size: Size = (96, 128)
    """Height and width in pixels."""
    seed: int = 0
    """Seeds the weights, the order of the scenes and every random draw."""
    steps: PositiveInt
    batch_size: PositiveInt
    learning_rate: PositiveFloat
    """Peak of a cosine schedule that ends at zero."""
    weight_decay: float = Field(default=0.05, ge=0)
    warmup_steps: int = Field(default=100, ge=0)


RECIPES: dict[str, PretrainConfig] = {
    "scenes_mae": PretrainConfig(
        objective="masked",
        model="vit_tiny_patch16_224",
        model_args={
            "img_size": [96, 128],
            "patch_size": 8,
            "embed_dim": 128,
            "depth": 6,
            "num_heads": 4,
        },
        steps=900,
        batch_size=128,
        learning_rate=1.5e-3,
    ),
    "scenes_clip": PretrainConfig(
        objective="contrastive",
        model="resnet10t",
        model_args={
            "channels": [32, 64, 128, 160],
            "layers": [1, 1, 2, 1],
            "stem_width": 16,
            "output_stride": 16,
        },
        steps=1500,
        batch_size=128,
        learning_rate=3e-3,
    ),
    "scenes_sam": PretrainConfig(
        objective="promptable",
        model="convnext_atto",
        model_args={
            "dims": [32, 64, 128, 160],
            "depths": [1, 2, 4, 2],
            "kernel_sizes": [3, 5, 5, 5],
            "output_stride": 8,
        },
        steps=1200,
        batch_size=32,
        learning_rate=2e-3,
    ),
}
