"""Masked autoencoding: rebuild the patches the encoder never saw.

Shape letters: B batch, L patches, K kept patches, D encoder width, E decoder width, P numbers
in a patch.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from stages.extract.pretrain.crops import random_crop
from stages.extract.pretrain.scenes_cache import Batch

MASKED_SHARE = 0.75
_SMALLEST_CROP = 0.5
_DECODER_WIDTH = 64
_DECODER_DEPTH = 1
_DECODER_HEADS = 4


class KeepPatches(nn.Module):
    """Sits at timm's `patch_drop` and lets only the patches of `indices` through."""

    def __init__(self, prefix_tokens: int) -> None:
        super().__init__()
        self.prefix_tokens = prefix_tokens
        self.indices: Int[Tensor, "B K"] | None = None

    def forward(self, tokens_BLD: Tensor) -> Tensor:
        """Drop patch tokens, keep the prefix tokens."""
        if self.indices is None:
            return tokens_BLD
        prefix, patches = tokens_BLD.tensor_split([self.prefix_tokens], dim=1)
        return torch.cat([prefix, take_tokens(patches, self.indices)], dim=1)


class MaskedAutoencoder(nn.Module):
    """Encoder on a quarter of the patches, light decoder on all (He et al. 2022, MAE).

    The target is each hidden patch's pixels, normalised by that patch's own mean and
    deviation (section 3, "Reconstruction target"); the loss is taken on hidden patches only.
    """

    positions: Tensor

    def __init__(self, encoder: VisionTransformer) -> None:
        super().__init__()
        self.encoder = encoder
        self.patch = int(encoder.patch_embed.patch_size[0])
        grid = list(encoder.patch_embed.grid_size)
        self.patches = math.prod(grid)
        self.kept = round(self.patches * (1 - MASKED_SHARE))
        self.keep = KeepPatches(encoder.num_prefix_tokens)
        encoder.add_module("patch_drop", self.keep)
        _init_positions(encoder, grid)
        self.embed = nn.Linear(encoder.embed_dim, _DECODER_WIDTH)
        self.hidden_token = nn.Parameter(torch.zeros(_DECODER_WIDTH))
        self.register_buffer("positions", build_sincos2d_pos_embed(grid, dim=_DECODER_WIDTH))
        self.decoder = nn.Sequential(
            *(Block(_DECODER_WIDTH, _DECODER_HEADS, qkv_bias=True) for _ in range(_DECODER_DEPTH)),
            nn.LayerNorm(_DECODER_WIDTH),
            nn.Linear(_DECODER_WIDTH, 3 * self.patch**2),
        )

    def forward(self, batch: Batch, generator: torch.Generator) -> Float[Tensor, ""]:
        """Compute the loss of one batch."""
        images = random_crop(batch, generator, _SMALLEST_CROP, flip=True).images
        order = torch.rand(len(images), self.patches, generator=generator).argsort(dim=1)
        predicted_BLP = self.rebuild(images, order)
        target_BLP = normalised_patches(images, self.patch)
        error_BL = (predicted_BLP.float() - target_BLP).square().mean(dim=2)
        return error_BL.gather(1, order[:, self.kept :]).mean()

    def rebuild(
        self, images: Float[Tensor, "B 3 H W"], order: Int[Tensor, "B L"]
    ) -> Float[Tensor, "B L P"]:
        """Predict all patches from the first of `order`, a permutation of the patches."""
        self.keep.indices = order[:, : self.kept]
        seen_BKD = self.encoder.forward_features(images)[:, self.keep.prefix_tokens :]
        self.keep.indices = None
        seen_BKE = self.embed(seen_BKD)
        hidden = self.hidden_token.to(seen_BKE.dtype).expand(
            len(images), self.patches - self.kept, -1
        )
        tokens_BLE = take_tokens(torch.cat([seen_BKE, hidden], dim=1), order.argsort(dim=1))
        predicted: Tensor = self.decoder(tokens_BLE + self.positions)
        return predicted


def take_tokens(
    tokens_BLD: Float[Tensor, "B L D"], indices: Int[Tensor, "B K"]
) -> Float[Tensor, "B K D"]:
    """Pick tokens of each image by index."""
    return tokens_BLD.gather(1, indices[..., None].expand(-1, -1, tokens_BLD.shape[2]))


def normalised_patches(images: Float[Tensor, "B 3 H W"], patch: int) -> Float[Tensor, "B L P"]:
    """Cut images into patches, each with zero mean and unit deviation."""
    patches = F.unfold(images, patch, stride=patch).transpose(1, 2)
    return F.layer_norm(patches, patches.shape[2:], eps=1e-4)


def _init_positions(encoder: VisionTransformer, grid: list[int]) -> None:
    # a random start leaves the decoder without any sense of place for the first epochs
    assert encoder.pos_embed is not None
    table = build_sincos2d_pos_embed(grid, dim=encoder.embed_dim)
    with torch.no_grad():
        encoder.pos_embed.zero_()
        encoder.pos_embed[0, encoder.pos_embed.shape[1] - len(table) :] = table
