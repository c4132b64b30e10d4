"""Files survive a failed write, a killed run and a torn last line."""

from pathlib import Path

import pytest
import torch

from stages.train.config import StudentConfig
from stages.train.files import write_atomically
from stages.train.log import TrainingLog
from stages.train.stem import StudentError, create_stem

ARGS = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    write_atomically(path, lambda temporary: temporary.write_text("old") and None)

    def fail(temporary: Path) -> None:
        temporary.write_text("half of the n")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_the_log_goes_on_after_the_resumed_step(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    log = TrainingLog(path, 0)
    assert log.last == {}
    for step in (2, 4, 6):
        log.append({"step": float(step), "loss": 1 / step})
    with path.open("a") as file:
        file.write("3")  # cut short: was to be 30 or more
    resumed = TrainingLog(path, 4)
    assert resumed.last == {"step": 4.0, "loss": 0.25}
    resumed.append({"step": 5.0, "loss": 0.125})
    assert path.read_text().splitlines() == ["step,loss", "2,0.5", "4,0.25", "5,0.125"]
    TrainingLog(path, 0)
    assert path.read_text() == ""


def stem_config(checkpoint: Path | None, **args: int) -> StudentConfig:
    return StudentConfig(
        model="vit_tiny_patch16_224", model_args={**ARGS, **args}, levels=2, checkpoint=checkpoint
    )


def test_the_stem_starts_from_a_file_of_another_image_size(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = create_stem(stem_config(None), (32, 32))
    torch.save(source.state_dict(), tmp_path / "vit.pth")
    stem = create_stem(stem_config(tmp_path / "vit.pth"), (24, 40))
    weight = "blocks.1.mlp.fc1.weight"
    assert stem.state_dict()[weight].equal(source.state_dict()[weight])
    assert stem.state_dict()["pos_embed"].shape == (1, 1 + 3 * 5, 32)
    with pytest.raises(StudentError, match=r"does not fit .*\n.*not in the student"):
        create_stem(stem_config(tmp_path / "vit.pth", depth=1), (32, 32))
    with pytest.raises(StudentError, match=r"blocks\.0\.attn\.proj\.bias: \(32,\) in the file"):
        create_stem(stem_config(tmp_path / "vit.pth", embed_dim=64), (32, 32))
    with pytest.raises(StudentError, match="no file at"):
        create_stem(stem_config(tmp_path / "none.pth"), (32, 32))
