"""Language-image contrast: tell which caption belongs to which picture.

Shape letters: B batch, N words of a caption, V words of the vocabulary, K cells of the
image's last grid, C encoder channels, E width of the shared space.
"""

import math
import re
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from timm.models.resnet import ResNet
from torch import Tensor, nn

from stages.data.scenes.materials import PALETTE
from stages.extract.pretrain.crops import cut, jitter_light
from stages.extract.pretrain.scenes_cache import Batch, close_up_size

_WIDTH = 96
_TEXT_LAYERS = 1
_TEXT_HEADS = 4
_LIGHT = 0.2
_FIRST_TEMPERATURE = 0.07
_LARGEST_SCALE = 100.0
_COLOUR_FREE_SHARE = 0.75
_OBJECTS_ONLY_SHARE = 0.75
_WORDS_WEIGHT = 20.0
_SHARPNESS = 10.0  # of the soft maximum over cosines
_PADDING = 0


class Tokenizer:
    """Words of a closed vocabulary to numbers; 0 pads."""

    def __init__(self, captions: Iterable[str]) -> None:
        words = sorted({word for caption in captions for word in split_words(caption)})
        self.numbers = {word: number for number, word in enumerate(words, start=1)}

    def __len__(self) -> int:
        """Count the words and the padding."""
        return len(self.numbers) + 1

    def __call__(self, captions: Sequence[str]) -> Int[Tensor, "B N"]:
        """Number the words of each caption, padded to the longest.

        Raises:
            KeyError: A word is not in the vocabulary.
        """
        rows = [[self.numbers[word] for word in split_words(caption)] for caption in captions]
        longest = max(map(len, rows))
        return torch.tensor([row + [_PADDING] * (longest - len(row)) for row in rows])

    def presence(self, tokens_BN: Int[Tensor, "B N"]) -> Float[Tensor, "B V"]:
        """Mark the words of each caption with 1."""
        present_BV = torch.zeros(len(tokens_BN), len(self)).scatter_(1, tokens_BN, 1.0)
        present_BV[:, _PADDING] = 0.0
        return present_BV


class TextEncoder(nn.Module):
    """A small transformer over words; returns every word in its context."""

    def __init__(self, vocabulary: int, longest: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, _WIDTH, padding_idx=_PADDING)
        self.positions = nn.Parameter(0.02 * torch.randn(longest, _WIDTH))
        layer = nn.TransformerEncoderLayer(
            _WIDTH, _TEXT_HEADS, 2 * _WIDTH, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, _TEXT_LAYERS, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(_WIDTH)

    def forward(self, tokens_BN: Int[Tensor, "B N"]) -> Float[Tensor, "B N E"]:
        """Encode captions."""
        embedded = self.words(tokens_BN) + self.positions[: tokens_BN.shape[1]]
        encoded: Tensor = self.norm(
            self.layers(embedded, src_key_padding_mask=tokens_BN == _PADDING)
        )
        return encoded


class LanguageImageContrast(nn.Module):
    """Two towers and two contrasts over the batch.

    The whole image against the whole caption (InfoNCE; Radford et al. 2021, CLIP), and the
    image's cells against single words (a sigmoid per pair; Zhai et al. 2023, SigLIP,
    equation 1): InfoNCE alone stays at chance for hundreds of steps at this size.
    """

    def __init__(
        self, encoder: ResNet, scenes: Sequence[Sequence[str]], image_size: tuple[int, int]
    ) -> None:
        super().__init__()
        self.encoder = encoder.to(memory_format=torch.channels_last)  # twice as fast
        self.window = close_up_size(image_size)
        captions = [caption for close_ups in scenes for caption in close_ups]
        self.tokenizer = Tokenizer(captions)
        longest = max(len(split_words(caption)) for caption in captions)
        self.text = TextEncoder(len(self.tokenizer), longest)
        self.cells_norm = nn.LayerNorm(encoder.num_features)
        self.project_image = nn.Linear(encoder.num_features, _WIDTH)
        self.project_cells = nn.Linear(encoder.num_features, _WIDTH)
        self.project_text = nn.Linear(_WIDTH, _WIDTH)
        self.log_scales = nn.Parameter(torch.full((2,), -math.log(_FIRST_TEMPERATURE)))
        share_V = self.tokenizer.presence(self.tokenizer(captions)).mean(dim=0)
        self.word_bias = nn.Parameter(share_V.logit(eps=1 / len(captions)))

    def forward(self, batch: Batch, generator: torch.Generator) -> Float[Tensor, ""]:
        """Compute the loss of one batch."""
        images = cut(batch.images, batch.corners, self.window)
        images = jitter_light(images, generator, _LIGHT)
        images = images.contiguous(memory_format=torch.channels_last)
        thinned_BN = self.tokenizer([thin_caption(text, generator) for text in batch.captions])
        cells_BKC = self.cells_norm(self.encoder.forward_features(images).flatten(2).mT)
        whole, parts = self.log_scales.exp().clamp(max=_LARGEST_SCALE)
        present_BV = self.tokenizer.presence(self.tokenizer(batch.captions))
        words_BV = parts * self.match_words(cells_BKC) + self.word_bias
        return contrast(whole * self.compare(cells_BKC, thinned_BN)) + _WORDS_WEIGHT * (
            F.binary_cross_entropy_with_logits(words_BV, present_BV)
        )

    def compare(
        self, cells_BKC: Float[Tensor, "B K C"], tokens_BN: Int[Tensor, "B N"]
    ) -> Float[Tensor, "B B"]:
        """Cosines of every image (row) with every caption (column)."""
        present = (tokens_BN != _PADDING)[..., None]
        caption_BE = (self.text(tokens_BN) * present).sum(dim=1) / present.sum(dim=1)
        image_BE = F.normalize(self.project_image(cells_BKC.mean(dim=1)).float(), dim=1)
        text_BE = F.normalize(self.project_text(caption_BE).float(), dim=1)
        return image_BE @ text_BE.T

    def match_words(self, cells_BKC: Float[Tensor, "B K C"]) -> Float[Tensor, "B V"]:
        """Let every word of the vocabulary find the cells of each image that suit it."""
        cells_BKE = F.normalize(self.project_cells(cells_BKC).float(), dim=2)
        words_VE = F.normalize(self.text.words.weight.float(), dim=1)
        return soft_maximum(cells_BKE @ words_VE.T)


def soft_maximum(values_BKV: Float[Tensor, "B K V"]) -> Float[Tensor, "B V"]:
    """Maximum over cells whose gradient reaches the runners-up too."""
    mean = (_SHARPNESS * values_BKV).logsumexp(dim=1) - math.log(values_BKV.shape[1])
    return mean / _SHARPNESS


def contrast(logits: Float[Tensor, "B B"]) -> Float[Tensor, ""]:
    """InfoNCE both ways: captions compete for an image, images for a caption."""
    answer = torch.arange(len(logits))
    return (F.cross_entropy(logits, answer) + F.cross_entropy(logits.T, answer)) / 2


def thin_caption(caption: str, generator: torch.Generator) -> str:
    """Leave out, at random, the colours and the first sentence, which is about the room.

    Colours of walls and floor alone tell most images of a batch apart; without them the
    classes, poses, numbers and places of things have to.
    """
    colour_free, objects_only = torch.rand(2, generator=generator).tolist()
    words = [
        word
        for sentence in caption.split(".")[objects_only < _OBJECTS_ONLY_SHARE :]
        for word in split_words(sentence)
        if colour_free >= _COLOUR_FREE_SHARE or word not in PALETTE
    ]
    return " ".join(words) or caption  # an empty room has no other sentence


def split_words(caption: str) -> list[str]:
    """Split a caption into lower-case words."""
    return re.findall(r"[a-z]+", caption.lower())
