import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from stages.extract.checkpoints import read_state, state_digest
from stages.extract.errors import MissingWeightsError, WrongCheckpointError
from stages.extract.timm_networks import TimmSource

MODEL = "test_vit"  # timm's own miniature: 160 x 160, patch 16, 6 blocks, 64 channels
LAST = (5,)
NATIVE = (160, 160)
State = dict[str, Tensor]


@pytest.fixture
def state() -> State:
    torch.manual_seed(1)
    return dict(timm.create_model(MODEL).state_dict())


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[State], TimmSource]:
    def save(state: State, **fields: Any) -> TimmSource:
        path = tmp_path / "weights.safetensors"
        save_file({key: value.contiguous() for key, value in state.items()}, path)
        return source(path, **fields)

    return save


def source(checkpoint: Any, name: str = MODEL, **model_args: Any) -> TimmSource:
    return TimmSource(name=name, checkpoint=checkpoint, model_args=model_args)


def test_a_local_file_gives_the_weights_that_it_holds(
    state: State, saved: Callable[..., TimmSource]
) -> None:
    network = saved(state).load(NATIVE, LAST)
    assert network.weights == "weights.safetensors"
    loaded = network.module.state_dict()
    assert loaded.keys() <= state.keys()
    assert all(torch.equal(value, state[key]) for key, value in loaded.items())


def test_what_is_tapped_are_raw_block_outputs(
    state: State, saved: Callable[..., TimmSource]
) -> None:
    network = saved(state).load(NATIVE, (1, 5))
    whole = timm.create_model(MODEL)
    whole.load_state_dict(state)
    images = torch.randn(2, 3, *NATIVE)
    network.module.eval()
    outputs: list[Tensor] = []
    for block in (1, 5):
        whole.blocks[block].register_forward_hook(lambda *call: outputs.append(call[2]))
    whole.eval()(images)
    maps, pooled = network.tap(images)
    for grid, tokens in zip(maps, outputs, strict=True):
        torch.testing.assert_close(grid.flatten(2).transpose(1, 2), tokens[:, 1:])
    assert pooled is not None
    torch.testing.assert_close(pooled, outputs[-1][:, 0])


def test_a_square_checkpoint_loads_at_a_size_that_is_not(
    state: State, saved: Callable[..., TimmSource]
) -> None:
    network = saved(state).load((96, 128), LAST)
    embedding = network.module.state_dict()["pos_embed"]
    resampled = resample_abs_pos_embed(state["pos_embed"], [6, 8], num_prefix_tokens=1)
    torch.testing.assert_close(embedding, resampled)
    maps, _ = network.tap(torch.zeros(1, 3, 96, 128))
    assert maps[0].shape == (1, 64, 6, 8)


def test_a_checkpoint_of_a_wide_size_loads_at_others(saved: Callable[..., TimmSource]) -> None:
    state = dict(timm.create_model(MODEL, img_size=(64, 96)).state_dict())
    wide = saved(state, img_size=[64, 96])
    assert wide.outline().native == (64, 96)
    unchanged = wide.load((64, 96), LAST).module.state_dict()["pos_embed"]
    assert torch.equal(unchanged, state["pos_embed"])
    resampled = resample_abs_pos_embed(
        state["pos_embed"], [8, 5], old_size=[4, 6], num_prefix_tokens=1
    )
    torch.testing.assert_close(
        wide.load((128, 80), LAST).module.state_dict()["pos_embed"], resampled
    )


@pytest.mark.parametrize(
    ("without", "taps"), [("head.", LAST), ("norm.", LAST), ("blocks.5.", (1, 4))]
)
def test_a_file_may_lack_what_no_level_needs(
    state: State, saved: Callable[..., TimmSource], without: str, taps: tuple[int, ...]
) -> None:
    partial = {key: value for key, value in state.items() if not key.startswith(without)}
    assert len(partial) < len(state)
    loaded = saved(partial).load(NATIVE, taps).module.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in loaded.items())


def test_a_classifier_of_other_classes_is_no_obstacle(
    state: State, saved: Callable[..., TimmSource]
) -> None:
    state |= {"head.weight": torch.zeros(7, 64), "head.bias": torch.zeros(7)}
    loaded = saved(state).load(NATIVE, LAST).module.state_dict()
    assert torch.equal(loaded["pos_embed"], state["pos_embed"])


def test_a_missing_weight_is_named(state: State, saved: Callable[..., TimmSource]) -> None:
    del state["blocks.3.attn.qkv.weight"]
    with pytest.raises(WrongCheckpointError, match=r"1 missing: blocks\.3\.attn\.qkv\.weight"):
        saved(state).load(NATIVE, LAST)


def test_an_unexpected_weight_is_named(state: State, saved: Callable[..., TimmSource]) -> None:
    state["blocks.6.attn.qkv.weight"] = torch.zeros(1)
    with pytest.raises(WrongCheckpointError, match=r"1 unexpected: blocks\.6\.attn\.qkv\.weight"):
        saved(state).load(NATIVE, LAST)


def test_weights_of_another_shape_are_named_with_both_shapes(
    state: State, saved: Callable[..., TimmSource]
) -> None:
    state["blocks.0.norm1.bias"] = torch.zeros(32)
    with pytest.raises(
        WrongCheckpointError, match=r"of another shape: blocks\.0\.norm1\.bias \(32 for 64\)"
    ):
        saved(state).load(NATIVE, LAST)


def test_the_weights_of_another_network_are_refused(saved: Callable[..., TimmSource]) -> None:
    other = dict(timm.create_model("test_convnext").state_dict())
    with pytest.raises(WrongCheckpointError, match=r"missing: .* and \d+ more\n.* unexpected: "):
        saved(other).load(NATIVE, LAST)


def test_a_published_file_of_other_names_is_converted_by_timm(tmp_path: Path) -> None:
    arguments = {"depth": 1, "embed_dim": 8, "num_heads": 1, "img_size": 64, "window_size": 2}
    state = timm.create_model("samvit_base_patch16", **arguments).state_dict()
    published = {f"image_encoder.{key.replace('mlp.fc', 'mlp.lin')}": state[key] for key in state}
    torch.save(published | {"prompt_encoder.x": torch.zeros(1)}, tmp_path / "sam.pth")
    theirs = source(tmp_path / "sam.pth", "samvit_base_patch16", **arguments)
    loaded = theirs.load((64, 64), (0,)).module.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in loaded.items())
    assert "blocks.0.mlp.fc1.weight" in loaded


def test_torch_files_and_wrappers_are_read(state: State, tmp_path: Path) -> None:
    wrapped = {f"module.{key}": value for key, value in state.items()}
    torch.save({"epoch": 3, "state_dict": wrapped}, tmp_path / "weights.pth")
    assert state_digest(read_state(tmp_path / "weights.pth")) == state_digest(state)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was executed",))


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth", "weights.bin"])
def test_a_damaged_file_is_no_weights(tmp_path: Path, name: str) -> None:
    for content in (b"", b"not weights at all", pickle.dumps(Bomb(), protocol=2)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(WrongCheckpointError, match=name):
            read_state(tmp_path / name)


def test_a_cut_short_file_is_no_weights(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "whole.pth")
    save_file(state, tmp_path / "whole.safetensors")
    for whole in tuple(tmp_path.iterdir()):
        part = tmp_path / f"part{whole.suffix}"
        part.write_bytes(whole.read_bytes()[:-1000])
        with pytest.raises(WrongCheckpointError, match="cannot be read as weights"):
            read_state(part)


def test_a_file_of_numbers_is_no_state_dict(tmp_path: Path) -> None:
    torch.save({"loss": 0.5}, tmp_path / "weights.pth")
    with pytest.raises(WrongCheckpointError, match="no plain dictionary of tensors"):
        read_state(tmp_path / "weights.pth")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingWeightsError, match=str(tmp_path / "weights.pth")):
        source(tmp_path / "weights.pth").load(NATIVE, LAST)


def test_random_weights_are_always_the_same_and_say_so() -> None:
    state = torch.get_rng_state()
    first, again = (source("random").load(NATIVE, LAST) for _ in range(2))
    assert first.weights == again.weights == "random weights"
    assert state_digest(first.module.state_dict()) == state_digest(again.module.state_dict())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_digest_sees_names_shapes_types_and_values() -> None:
    base = {"a": torch.zeros(4), "b": torch.ones(2)}
    others = [
        {"a": torch.zeros(4), "c": torch.ones(2)},
        {"a": torch.zeros(2, 2), "b": torch.ones(2)},
        {"a": torch.zeros(4, dtype=torch.int32), "b": torch.ones(2)},
        {"a": torch.zeros(4), "b": torch.tensor([1.0, 2.0])},
    ]
    digests = {state_digest(state) for state in (base, *others)}
    assert len(digests) == 5
    assert state_digest(dict(reversed(base.items()))) == state_digest(base)
    scalar = {"a": torch.tensor(1.0, dtype=torch.bfloat16)}
    assert state_digest(scalar) != state_digest({"a": torch.tensor(2.0, dtype=torch.bfloat16)})
