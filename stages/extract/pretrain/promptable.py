"""Promptable masks: say which pixels belong to the thing under a point.

Shape letters: B batch, N prompts per image, H W pixels, h w the mask's grid (a quarter of the
pixels), C decoder channels, L tokens of the encoder.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from timm.models import FeatureInfo
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from stages.extract.pretrain.crops import jitter_light, random_crop
from stages.extract.pretrain.scenes_cache import Batch

PROMPTS = 8
MASK_STRIDE = 4
_CHANNELS = 64
_MASK_CHANNELS = 32
_HEADS = 4
_LAYERS = 2
_SMALLEST_CROP = 0.6
_LIGHT = 0.2
_SMALLEST_AREA = 16  # pixels; anything smaller vanishes on the mask's grid


class PromptAttention(nn.Module):
    """Lets every prompt read the image; prompts do not see each other."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_prompt = nn.LayerNorm(_CHANNELS)
        self.attention = nn.MultiheadAttention(_CHANNELS, _HEADS, batch_first=True)
        self.mlp = nn.Sequential(
            nn.LayerNorm(_CHANNELS),
            nn.Linear(_CHANNELS, 2 * _CHANNELS),
            nn.GELU(),
            nn.Linear(2 * _CHANNELS, _CHANNELS),
        )

    def forward(self, prompts_BNC: Tensor, keys_BLC: Tensor, values_BLC: Tensor) -> Tensor:
        """Update the prompts."""
        query = self.norm_prompt(prompts_BNC)
        read, _ = self.attention(query, keys_BLC, values_BLC, need_weights=False)
        prompts_BNC = prompts_BNC + read
        updated: Tensor = prompts_BNC + self.mlp(prompts_BNC)
        return updated


class PromptableMasks(nn.Module):
    """One pass of the encoder, many point prompts, light decoder (Kirillov et al. 2023, SAM).

    Each prompt yields the mask of the instance under its point and that mask's outline.
    Nothing tells the model which class an instance has.
    """

    positions: Tensor

    def __init__(self, encoder: ConvNeXt, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.encoder = encoder
        feature_info = FeatureInfo(encoder.feature_info, (0, 3))
        stride = feature_info.reduction()[-1]
        grid = [side // stride for side in image_size]
        self.register_buffer("positions", build_sincos2d_pos_embed(grid, dim=_CHANNELS))
        self.neck = nn.Sequential(
            nn.LayerNorm(encoder.num_features), nn.Linear(encoder.num_features, _CHANNELS)
        )
        self.layers = nn.ModuleList(PromptAttention() for _ in range(_LAYERS))
        self.to_masks = nn.Sequential(
            nn.LayerNorm(_CHANNELS),
            nn.Linear(_CHANNELS, 2 * _CHANNELS),
            nn.GELU(),
            nn.Linear(2 * _CHANNELS, 2 * _MASK_CHANNELS),
        )
        scale = stride // MASK_STRIDE
        self.upscale = nn.ConvTranspose2d(_CHANNELS, _MASK_CHANNELS, scale, stride=scale)
        self.lateral = nn.Conv2d(feature_info.channels()[0], _MASK_CHANNELS, 1)
        self.smooth = nn.Sequential(
            nn.GELU(), nn.Conv2d(_MASK_CHANNELS, _MASK_CHANNELS, 3, padding=1)
        )

    def forward(self, batch: Batch, generator: torch.Generator) -> Float[Tensor, ""]:
        """Compute the loss of one batch."""
        batch = random_crop(batch, generator, _SMALLEST_CROP, flip=True)
        images = jitter_light(batch.images, generator, _LIGHT)
        points = sample_points(batch.instances, PROMPTS, generator)
        masks, outlines = prompted_targets(batch.instances, points)
        logits = self.predict(images, points).float()
        return mask_loss(logits[:, :, 0], masks) + mask_loss(logits[:, :, 1], outlines)

    def predict(
        self, images: Float[Tensor, "B 3 H W"], points: Int[Tensor, "B N"]
    ) -> Float[Tensor, "B N 2 h w"]:
        """Predict the logits of each prompt's mask and outline; points are flat pixel indices."""
        last, levels = self.encoder.forward_intermediates(images)
        values_BLC = self.neck(last.flatten(2).mT)
        keys_BLC = values_BLC + self.positions
        image_BChw = values_BLC.mT.reshape(len(images), _CHANNELS, *last.shape[2:])
        fine_BChw = self.smooth(self.upscale(image_BChw) + self.lateral(levels[0]))
        prompts_BNC = look_up(
            keys_BLC.mT.reshape(image_BChw.shape), points, (images.shape[2], images.shape[3])
        )
        for layer in self.layers:
            prompts_BNC = layer(prompts_BNC, keys_BLC, values_BLC)
        weights_BNTC = torch.stack(self.to_masks(prompts_BNC).chunk(2, dim=2), dim=2)
        return torch.einsum("bntc,bchw->bnthw", weights_BNTC, fine_BChw) / math.sqrt(_MASK_CHANNELS)


def look_up(
    features_BChw: Float[Tensor, "B C h w"], points: Int[Tensor, "B N"], image_size: tuple[int, int]
) -> Float[Tensor, "B N C"]:
    """Interpolate features under points, which are flat pixel indices."""
    height, width = image_size
    place_BN2 = torch.stack([points % width, points // width], dim=-1) + 0.5
    place_BN2 = 2 * place_BN2 / torch.tensor([width, height]) - 1
    found = F.grid_sample(
        features_BChw.float(), place_BN2[:, :, None], padding_mode="border", align_corners=False
    )
    return found[..., 0].mT


def sample_points(
    instances: Int[Tensor, "B H W"], prompts: int, generator: torch.Generator
) -> Int[Tensor, "B N"]:
    """Draw pixels so that every instance of an image, large or small, is as likely."""
    flat = instances.flatten(1)
    areas = torch.zeros(len(flat), int(flat.max()) + 1).scatter_add_(
        1, flat, torch.ones(flat.shape)
    )
    chance = torch.where(areas >= _SMALLEST_AREA, 1 / areas.clamp(min=1), 0.0)
    return torch.multinomial(chance.gather(1, flat), prompts, True, generator=generator)


def prompted_targets(
    instances: Int[Tensor, "B H W"], points: Int[Tensor, "B N"]
) -> tuple[Float[Tensor, "B N h w"], Float[Tensor, "B N h w"]]:
    """Make each prompt's mask (share of covered pixels) and outline (0 or 1)."""
    chosen = instances.flatten(1).gather(1, points)
    masks = (instances[:, None] == chosen[:, :, None, None]).float()
    largest = F.max_pool2d(masks, MASK_STRIDE + 2, MASK_STRIDE, padding=1)
    # padding counts as minus infinity here, so the image's border is no outline
    smallest = -F.max_pool2d(-masks, MASK_STRIDE + 2, MASK_STRIDE, padding=1)
    return F.avg_pool2d(masks, MASK_STRIDE), largest - smallest


def mask_loss(
    logits: Float[Tensor, "B N h w"], target: Float[Tensor, "B N h w"]
) -> Float[Tensor, ""]:
    """Cross-entropy plus dice (Milletari et al. 2016), averaged over prompts."""
    probability = logits.sigmoid()
    overlap = (probability * target).sum(dim=(2, 3))
    total = probability.sum(dim=(2, 3)) + target.sum(dim=(2, 3))
    dice = 1 - (2 * overlap + 1) / (total + 1)
    return F.binary_cross_entropy_with_logits(logits, target) + dice.mean()
