"""The recipe of the small teachers, at toy size."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from stages.data.scenes import render_scene, scene_seed
from stages.data.scenes.materials import PALETTE
from stages.extract.config import TeacherConfig
from stages.extract.pretrain import scenes_cache
from stages.extract.pretrain.config import RECIPES, PretrainConfig
from stages.extract.pretrain.contrastive import (
    Tokenizer,
    contrast,
    soft_maximum,
    thin_caption,
)
from stages.extract.pretrain.crops import cut, random_crop
from stages.extract.pretrain.masked import MASKED_SHARE, MaskedAutoencoder, normalised_patches
from stages.extract.pretrain.promptable import mask_loss, prompted_targets, sample_points
from stages.extract.pretrain.run import pretrain
from stages.extract.pretrain.scenes_cache import (
    CLOSE_UPS,
    SceneCache,
    close_ups,
    load_scenes,
    row_batches,
)
from stages.extract.teachers import load_teacher
from stages.progress import NoProgress

SIZE = (32, 48)
WEIGHTS = Path(__file__).parents[2] / "stages" / "extract" / "weights"
TOY_VIT = {"img_size": list(SIZE), "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
TOY_ARGUMENTS = {
    "scenes_mae": TOY_VIT,
    "scenes_clip": {"channels": [8, 16, 24, 32], "layers": [1, 1, 1, 1], "stem_width": 8},
    "scenes_sam": {"dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "output_stride": 8},
}


@pytest.fixture
def scenes() -> SceneCache:
    """Eight grey rooms, each with a coloured square in its own place, told in words."""
    images = np.full((8, *SIZE, 3), 90, np.uint8)
    instances = np.zeros((8, *SIZE), np.uint8)
    corners = np.zeros((8, CLOSE_UPS, 2), np.int16)
    captions = []
    for index in range(8):
        top, left = 12 * (index % 2) + 2, 10 * (index // 2) + 2
        window = np.s_[index, top : top + 10, left : left + 8]
        images[window] = (30 * index, 255 - 30 * index, 40)
        instances[window] = 1
        corners[index] = min(top, 16), min(left, 24)
        captions.append((f"a grey room. a box at place {'abcdefgh'[index]}.",) * CLOSE_UPS)
    return SceneCache(images=images, instances=instances, corners=corners, captions=tuple(captions))


def toy_recipe(name: str) -> PretrainConfig:
    return RECIPES[name].model_copy(
        update={
            "image_size": SIZE,
            "model_args": TOY_ARGUMENTS[name],
            "steps": 20,
            "batch_size": 8,
            "learning_rate": 3e-3,
            "warmup_steps": 3,
        }
    )


@pytest.mark.parametrize("name", list(RECIPES))
def test_recipe_learns_and_its_file_loads_strictly(
    name: str, scenes: SceneCache, tmp_path: Path
) -> None:
    recipe = toy_recipe(name)
    summary = pretrain(recipe, scenes, tmp_path / "weights.safetensors", NoProgress())
    assert summary.last_loss < 0.97 * summary.first_loss
    encoder = timm.create_model(recipe.model, num_classes=0, **recipe.model_args)
    encoder.prune_intermediate_layers()
    encoder.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    assert [path.name for path in tmp_path.iterdir()] == ["weights.safetensors"]


def test_shipped_weights_are_small() -> None:
    files = list(WEIGHTS.glob("*.safetensors"))
    assert {file.stem for file in files} == set(RECIPES)
    assert sum(file.stat().st_size for file in files) <= 12_000_000


def test_same_seed_gives_the_same_weights(scenes: SceneCache, tmp_path: Path) -> None:
    recipe = toy_recipe("scenes_sam").model_copy(update={"steps": 2})
    for name in ("first", "second"):
        pretrain(recipe, scenes, tmp_path / name, NoProgress())
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


@pytest.mark.parametrize("name", list(RECIPES))
def test_shipped_weights_load_as_a_teacher_of_four_levels(name: str) -> None:
    recipe = RECIPES[name]
    teacher = load_teacher(
        name,
        TeacherConfig(
            source=f"timm:{recipe.model}",
            model_args=recipe.model_args,
            checkpoint=WEIGHTS / f"{name}.safetensors",
        ),
        recipe.image_size,
        torch.device("cpu"),
    )
    assert len(teacher.spec.levels) == 4
    encoder = timm.create_model(recipe.model, num_classes=0, **recipe.model_args)
    assert sum(weight.numel() for weight in encoder.parameters()) <= 1_500_000


def test_encoder_sees_a_quarter_of_the_patches(scenes: SceneCache) -> None:
    encoder = timm.create_model("vit_tiny_patch16_224", num_classes=0, **TOY_VIT)
    model = MaskedAutoencoder(encoder)
    seen: list[int] = []
    encoder.blocks[0].register_forward_pre_hook(lambda _, tokens: seen.append(tokens[0].shape[1]))
    images = scenes.batch(np.arange(2), 0, torch.zeros(3), torch.ones(3)).images
    order = torch.stack([torch.randperm(24), torch.randperm(24)])
    with torch.no_grad():
        before = model.rebuild(images, order)
        hidden = torch.nn.functional.fold(
            torch.zeros(2, 192, 24).scatter(2, order[:, None, 6:].expand(-1, 192, -1), 5.0),
            SIZE, 8, stride=8,
        )  # fmt: skip
        after = model.rebuild(images + hidden, order)
    assert seen == [1 + round(24 * (1 - MASKED_SHARE))] * 2
    assert torch.equal(before, after)  # what is hidden cannot leak into the prediction


def test_pixel_targets_have_zero_mean_and_unit_deviation() -> None:
    patches = normalised_patches(torch.rand(2, 3, *SIZE), 8)
    assert patches.shape == (2, 24, 192)
    torch.testing.assert_close(patches.mean(dim=2), torch.zeros(2, 24), atol=1e-5, rtol=0)
    torch.testing.assert_close(patches.var(dim=2), torch.ones(2, 24), atol=0.02, rtol=0)


def test_captions_are_tokenised_and_padded() -> None:
    tokenizer = Tokenizer(["a red box.", "a ball, behind a box"])
    tokens = tokenizer(["a red box.", "A ball behind a box"])
    assert tokens.shape == (2, 5)
    assert tokens[0, 3:].tolist() == [0, 0]
    assert tokens[0, 0] == tokens[1, 0] != tokens[0, 1]
    assert tokens.max() < len(tokenizer) == 6
    with pytest.raises(KeyError, match="sofa"):
        tokenizer(["a sofa"])


def test_thinned_captions_lose_colours_and_the_room_but_never_everything() -> None:
    caption = "a room with a red floor. a blue chair is behind a box."
    generator = torch.Generator().manual_seed(0)
    thinned = {thin_caption(caption, generator) for _ in range(50)}
    assert thinned == {
        "a room with a red floor a blue chair is behind a box",
        "a room with a floor a chair is behind a box",
        "a blue chair is behind a box",
        "a chair is behind a box",
    }
    assert thin_caption("a room.", generator)
    assert {"red", "blue"} <= set(PALETTE)


def test_presence_marks_each_word_once_and_no_padding() -> None:
    tokenizer = Tokenizer(["a box and a ball"])
    tokens = tokenizer(["a ball and a ball", "box"])
    present = tokenizer.presence(tokens)
    assert present.shape == (2, 5)
    assert present.sum(dim=1).tolist() == [3, 1]
    assert present[1, tokenizer.numbers["box"]] == 1


def test_soft_maximum_lies_between_mean_and_maximum() -> None:
    values = torch.rand(2, 6, 3)
    found = soft_maximum(values)
    assert (found > values.mean(dim=1)).all()
    assert (found < values.amax(dim=1)).all()
    torch.testing.assert_close(soft_maximum(torch.full((1, 4, 1), 0.3)), torch.tensor([[0.3]]))


def test_contrast_is_low_only_for_matching_pairs() -> None:
    right = 20 * torch.eye(4)
    assert contrast(right) < 1e-3
    assert contrast(right.flip(1)) > 10


def test_prompts_reach_small_and_large_instances_alike() -> None:
    instances = torch.zeros(1, *SIZE, dtype=torch.long)
    instances[0, :5, :5] = 1
    instances[0, 20:22, 20:22] = 2  # too small to be asked for
    points = sample_points(instances, 400, torch.Generator().manual_seed(0))
    chosen = instances.flatten(1).gather(1, points)[0].bincount(minlength=3)
    assert chosen[2] == 0
    assert 150 < chosen[1] < 250


def test_prompted_targets_are_the_instance_and_its_outline() -> None:
    instances = torch.zeros(1, 16, 16, dtype=torch.long)
    instances[0, :8, :8] = 3
    masks, outlines = prompted_targets(instances, torch.tensor([[0, 16 * 15]]))
    expected = torch.zeros(4, 4)
    expected[:2, :2] = 1
    assert torch.equal(masks[0, 0], expected)
    assert torch.equal(masks[0, 1], 1 - expected)
    assert outlines[0, 0, 0, 0] == 0  # the image's border is no outline
    assert outlines[0, 0, 1, 1] == 1
    assert outlines[0, 0, 3, 3] == 0


def test_mask_loss_prefers_the_right_mask() -> None:
    target = torch.zeros(1, 1, 4, 4)
    target[..., :2] = 1
    logits = 20 * (target - 0.5)
    assert mask_loss(logits, target) < 0.1
    assert mask_loss(-logits, target) > 1


def test_crops_keep_images_and_instances_aligned(scenes: SceneCache) -> None:
    batch = scenes.batch(np.arange(8), 0, torch.zeros(3), torch.ones(3))
    crop = random_crop(batch, torch.Generator().manual_seed(0), 0.5, flip=True)
    assert not torch.equal(crop.instances, batch.instances)
    wall = (crop.images[:, 0] - 90 / 255).abs() < 1e-4
    assert (wall | (crop.instances == 1))[3:].float().mean() > 0.95


def test_rows_of_an_epoch_are_a_permutation() -> None:
    batches = row_batches(10, 5, seed=0)
    first = np.concatenate([next(batches), next(batches)])
    assert sorted(first) == list(range(10))
    assert (np.concatenate([next(batches), next(batches)]) != first).any()


def test_cache_is_written_once_and_refuses_another_recipe(
    tmp_path: Path, scenes: SceneCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scenes_cache, "render_scenes", lambda *_: scenes)
    path = tmp_path / "cache" / "scenes.npz"
    load_scenes(path, 8, SIZE, 0, NoProgress())
    monkeypatch.setattr(scenes_cache, "render_scenes", None)
    again = load_scenes(path, 8, SIZE, 0, NoProgress())
    assert np.array_equal(again.images, scenes.images)
    assert again.captions == scenes.captions
    with pytest.raises(ValueError, match="delete the file"):
        load_scenes(path, 9, SIZE, 0, NoProgress())


def test_rendered_scenes_are_the_same_in_any_process() -> None:
    scenes = scenes_cache.render_scenes(2, SIZE, 0, NoProgress(), workers=1)
    scene = render_scene(scene_seed("pretrain", 0, 1), SIZE)
    corners, captions = close_ups(scene_seed("pretrain", 0, 1), scene.instances)
    assert np.array_equal(scenes.images[1], scene.image)
    assert np.array_equal(scenes.instances[1], scene.instances)
    assert np.array_equal(scenes.corners[1], corners)
    assert scenes.captions[1] == captions


def test_close_ups_are_told_in_the_words_of_their_own_scene() -> None:
    number = scene_seed("pretrain", 0, 3)
    scene = render_scene(number, SIZE)
    corners, captions = close_ups(number, scene.instances)
    assert len(captions) == len(corners) == CLOSE_UPS
    assert (corners >= 0).all()
    assert (corners <= [SIZE[0] // 2, SIZE[1] // 2]).all()
    room = scene.caption.split(".")[0]  # floor and wall: the set-up is that of render_scene
    assert all(caption.split(".")[0] == room for caption in captions)
    assert len(set(captions)) > 1


def test_cut_takes_each_image_at_its_own_corner() -> None:
    images = torch.rand(2, 3, *SIZE)
    windows = cut(images, torch.tensor([[0, 0], [16, 24]]), (16, 24))
    assert torch.equal(windows[0], images[0, :, :16, :24])
    assert torch.equal(windows[1], images[1, :, 16:, 24:])
