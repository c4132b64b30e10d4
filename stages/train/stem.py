"""Teacher-Agnostic Stem: any timm VisionTransformer, without its final norm and classifier."""

from difflib import get_close_matches
from pathlib import Path
from pickle import UnpicklingError

import timm
import torch
from safetensors import SafetensorError
from timm.models import load_state_dict
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stages.train.config import StudentConfig

UNUSED_WEIGHTS = ("head", "norm.", "fc_norm.", "attn_pool.")


class StudentError(ValueError):
    """The student asked for cannot be built, or its weights do not fit."""


def tapped_blocks(levels: int | tuple[int, ...], depth: int) -> tuple[int, ...]:
    """Return the zero-based blocks of the levels of a stem with `depth` blocks.

    A number n means n evenly spaced blocks that end with the last: (k + 1) depth / n - 1, which
    is 2, 5, 8, 11 for twelve blocks and four levels.

    Raises:
        StudentError: more levels than blocks, or an index beyond the last block.
    """
    if isinstance(levels, tuple):
        if levels[-1] >= depth:
            raise StudentError(
                f"student.levels asks for block {levels[-1]}, but the student has {depth} blocks "
                f"(0 to {depth - 1}); choose smaller indices"
            )
        return levels
    if levels > depth:
        raise StudentError(
            f"student.levels asks for {levels} levels of a student with {depth} blocks; "
            f"choose at most {depth}"
        )
    return tuple((index + 1) * depth // levels - 1 for index in range(levels))


def create_stem(config: StudentConfig, image_size: tuple[int, int]) -> VisionTransformer:
    """Build the ViT at `image_size` (height, width), cut after its last tapped block.

    Raises:
        StudentError: unknown model, not a VisionTransformer, a size that the patch does not
            divide, or weights that do not fit.
    """
    if not timm.is_model(config.model):
        near = get_close_matches(config.model, timm.list_models(), n=3)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise StudentError(f"student.model: timm knows no model {config.model!r}{hint}")
    try:
        vit = timm.create_model(
            config.model,
            pretrained=config.pretrained and config.checkpoint is None,
            img_size=image_size,
            dynamic_img_size=True,
            num_classes=0,
            **config.model_args,
        )
    except OSError as error:
        raise StudentError(
            f"student.pretrained: the weights of {config.model!r} cannot be fetched from the Hugging "
            f"Face hub ({error}); go online, or name a local file as student.checkpoint"
        ) from error
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise StudentError(
            f"student.model {config.model!r} with model_args {config.model_args}: "
            f"{str(error) or type(error).__name__}; "
            "expected a model of timm's VisionTransformer family and arguments that it takes"
        ) from error
    if not isinstance(vit, VisionTransformer):
        raise StudentError(
            f"student.model {config.model!r} is a {type(vit).__name__}, expected one of timm's "
            "VisionTransformer family, e.g. vit_base_patch16_384"
        )
    check_image_size(vit, image_size)
    if config.checkpoint is not None:
        load_stem_weights(vit, config.checkpoint)
    vit.prune_intermediate_layers(
        list(tapped_blocks(config.levels, len(vit.blocks))), prune_norm=True
    )
    return vit


def check_image_size(vit: VisionTransformer, image_size: tuple[int, int]) -> None:
    """Refuse a height or width that the patch size does not divide.

    Raises:
        StudentError: with the nearest sizes that fit.
    """
    patch = vit.patch_embed.patch_size
    if any(size % side for size, side in zip(image_size, patch, strict=True)):
        fitting = tuple(max(1, round(s / p)) * p for s, p in zip(image_size, patch, strict=True))
        raise StudentError(
            f"image size {tuple(image_size)} is not a multiple of the student's patch "
            f"{tuple(patch)}; the nearest that is: {fitting}"
        )


def load_stem_weights(vit: VisionTransformer, path: Path) -> None:
    """Load a whole ViT from a file; position embeddings are resized by timm.

    Raises:
        StudentError: no such file, or weights missing or left over (classifier and final norm
            aside).
    """
    if not path.is_file():
        raise StudentError(f"student.checkpoint: no file at {path}; put the weights there")
    try:
        weights = checkpoint_filter_fn(load_state_dict(str(path)), vit)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise StudentError(f"student.checkpoint: {path} cannot be read ({error})") from error
    wanted = vit.state_dict()
    wrong = [
        f"{name}: {tuple(weights[name].shape)} in the file, {tuple(wanted[name].shape)} expected"
        for name in wanted.keys() & weights.keys()
        if weights[name].shape != wanted[name].shape
    ]
    wrong += [f"{name}: not in the file" for name in wanted.keys() - weights.keys()]
    wrong += [f"{name}: not in the student" for name in weights.keys() - wanted.keys()]
    wrong = sorted(line for line in wrong if not line.startswith(UNUSED_WEIGHTS))
    if wrong:
        shown = "\n  ".join(wrong[:10])
        raise StudentError(
            f"{path} does not fit the student ({len(wrong)} differences; the first ones):\n  "
            f"{shown}\nChoose the file of this timm model, or correct student.model_args"
        )
    vit.load_state_dict({k: v for k, v in weights.items() if k in wanted}, strict=False)


def normalisation(config: StudentConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation per channel: those asked for, else timm's own."""
    stated = timm.models.get_pretrained_cfg(config.model)
    assert stated is not None, f"timm lists {config.model} without a configuration"
    return config.mean or tuple(stated.mean), config.std or tuple(stated.std)


def stem_states(vit: VisionTransformer, images: Tensor) -> list[Tensor]:
    """Return x_0 (embedded tokens) and the output of every block, each `B L D`.

    All prefix tokens (class token, registers) are kept. `images` is `B 3 H W`. Where timm's
    `grad_checkpointing` is set, a block is computed again in the backward pass.
    """
    tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
    states = [tokens]
    for block in vit.blocks:
        if vit.grad_checkpointing and torch.is_grad_enabled():
            states.append(checkpoint(block, states[-1], use_reentrant=False))
        else:
            states.append(block(states[-1]))
    return states
