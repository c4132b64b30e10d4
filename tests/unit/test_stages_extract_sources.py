import json
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file

from stages.extract.errors import (
    MissingWeightsError,
    TeacherError,
    UnknownTeacherError,
    WrongCheckpointError,
)
from stages.extract.open_clip_networks import OpenClipSource
from stages.extract.timm_networks import TimmSource

NATIVE, LAST = (160, 160), (5,)  # of timm's miniature test_vit


def source(checkpoint: Any, name: str = "test_vit", **model_args: Any) -> TimmSource:
    return TimmSource(name=name, checkpoint=checkpoint, model_args=model_args)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hugging Face hub, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_without_network_the_file_wanted_is_named(hub: Path) -> None:
    with pytest.raises(MissingWeightsError) as caught:
        source(None).load(NATIVE, LAST)
    for part in ("timm/test_vit.r160_in1k", "model.safetensors", "`checkpoint:`", str(hub)):
        assert part in str(caught.value)


def test_without_network_the_file_of_open_clip_is_named_too(hub: Path) -> None:
    tower = OpenClipSource(name="ViT-B-16", tag="laion2b_s34b_b88k", checkpoint=None, model_args={})
    with pytest.raises(MissingWeightsError) as caught:
        tower.load((96, 128), (11,))
    for part in (
        "laion/CLIP-ViT-B-16-laion2B-s34B-b88K",
        "open_clip_model.safetensors",
        "`checkpoint:`",
    ):
        assert part in str(caught.value)


def test_the_hubs_file_is_used_where_it_is_cached(hub: Path) -> None:
    state = timm.create_model("test_vit").state_dict()
    folder = hub / "models--timm--test_vit.r160_in1k"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    save_file(state, snapshot / "model.safetensors")
    network = source(None).load(NATIVE, LAST)
    loaded = network.module.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in loaded.items())
    assert "timm/test_vit.r160_in1k" in network.weights
    facts = source(None).outline().facts
    assert (facts["tag"], facts["licence"]) == ("r160_in1k", "apache-2.0")


def test_a_local_copy_of_published_weights_keeps_their_licence(tmp_path: Path) -> None:
    copy = source(tmp_path / "model.safetensors", "test_vit.r160_in1k").outline().facts
    assert (copy["tag"], copy["licence"]) == ("r160_in1k", "apache-2.0")
    own = source(tmp_path / "model.safetensors").outline().facts
    assert (own["tag"], own["licence"]) == (None, None)


@pytest.mark.parametrize(
    ("name", "arguments", "error", "message"),
    [
        ("test_vitt", {}, UnknownTeacherError, "no model 'test_vitt'; did you mean .*'test_vit'"),
        ("test_vit.r161_in1k", {}, UnknownTeacherError, "did you mean 'r160_in1k'"),
        ("test_vit", {"colour": 1}, TeacherError, r"model_args .*unexpected keyword .*colour"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(
    name: str, arguments: dict[str, Any], error: type[TeacherError], message: str
) -> None:
    with pytest.raises(error, match=message):
        source("random", name, **arguments).outline()


@pytest.mark.parametrize(
    ("name", "tag", "message"),
    [
        ("ViT-B-17", "openai", "no model 'ViT-B-17'; did you mean 'ViT-B-16'"),
        ("ViT-B-16", "opena", "no weights 'opena' for ViT-B-16; did you mean 'openai'"),
        ("ViT-B-16", "", "no weights '' for ViT-B-16; known: "),
    ],
)
def test_unknown_names_of_open_clip_are_refused(name: str, tag: str, message: str) -> None:
    with pytest.raises(UnknownTeacherError, match=message):
        OpenClipSource(name=name, tag=tag, checkpoint=None, model_args={}).outline()


def test_a_tower_that_cannot_be_tapped_is_refused() -> None:
    tower = OpenClipSource(name="RN50", tag="", checkpoint="random", model_args={})
    with pytest.raises(TeacherError, match=r"ModifiedResNet.*timm:resnet50_clip"):
        tower.outline()


def test_openais_weights_get_the_activation_they_were_trained_with() -> None:
    with torch.device("meta"):
        model = OpenClipSource(
            name="ViT-B-32", tag="openai", checkpoint="random", model_args={}
        )._create(device="meta")
    assert type(model.visual.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"


@pytest.fixture
def clip(tmp_path: Path) -> str:
    vision = {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 16}
    text = {"context_length": 4, "vocab_size": 16, "width": 16, "heads": 1, "layers": 1}
    path = tmp_path / "sak-unit-clip.json"
    path.write_text(json.dumps({"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(path)
    return path.stem


def test_open_clip_loads_a_local_file_at_another_size(clip: str, tmp_path: Path) -> None:
    model = open_clip.create_model(clip)
    save_file(model.state_dict(), tmp_path / "clip.safetensors")
    tower = OpenClipSource(
        name=clip, tag="", checkpoint=tmp_path / "clip.safetensors", model_args={}
    )
    assert tower.outline().native == (32, 32)
    assert tower.outline().reductions == (16, 16)
    network = tower.load((32, 64), (1,))
    state = model.visual.state_dict()
    loaded = network.module.state_dict()
    assert loaded["positional_embedding"].shape == (9, 16)
    key = "transformer.resblocks.1.mlp.c_fc.weight"
    assert torch.equal(loaded[key], state[key])
    maps, pooled = network.tap(torch.zeros(1, 3, 32, 64))
    assert maps[0].shape == (1, 16, 2, 4)
    assert pooled is not None
    assert pooled.shape == (1, 16)


def test_open_clip_refuses_the_weights_of_another_network(clip: str, tmp_path: Path) -> None:
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "vit.safetensors")
    tower = OpenClipSource(
        name=clip, tag="", checkpoint=tmp_path / "vit.safetensors", model_args={}
    )
    with pytest.raises(WrongCheckpointError, match=r"missing: .*\n.*unexpected: "):
        tower.load((32, 32), (1,))
    (tmp_path / "vit.safetensors").write_bytes(b"nothing")
    with pytest.raises(WrongCheckpointError, match="cannot be read as weights"):
        tower.load((32, 32), (1,))
