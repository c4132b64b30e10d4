"""Real NYUD-v2 frames in the published layout."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stages.data.config import NyudData
from stages.data.dataset import open_dataset

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


def viewing_rays(height: int, width: int) -> np.ndarray:
    """Direction of each pixel of a NYUD-v2 frame resized to this size; x right, y down, z forward."""
    camera = json.loads((SHARED / "nyud" / "meta.json").read_text())
    x = ((np.arange(width) + 0.5) * 640 / width - camera["cx"]) / camera["fx"]
    y = ((np.arange(height) + 0.5) * 480 / height - camera["cy"]) / camera["fy"]
    return np.stack([*np.meshgrid(x, y), np.ones((height, width))], axis=-1)


def test_real_nyud_frames(tmp_path: Path) -> None:
    builder = SHARED / "build_nyud_layout.py"
    if not builder.is_file():
        pytest.skip("the real NYUD-v2 frames are not beside this checkout")
    pytest.importorskip("cv2", reason="build_nyud_layout.py needs opencv")
    size = ["--limit", "6", "--height", "448", "--width", "576"]
    subprocess.run([sys.executable, builder, tmp_path, *size], check=True, capture_output=True)
    dataset = open_dataset(NyudData(kind="nyud", root=tmp_path))
    assert {name: len(ids) for name, ids in dataset.splits.items()} == {"train": 4, "val": 2}
    rays = viewing_rays(448, 576)
    for split in dataset.splits:
        dataset.check_labels(split)
        for image_id in dataset.split(split):
            labels = dataset.labels(image_id, (448, 576))
            known = np.linalg.norm(labels["normals"], axis=-1) > 0
            assert known.mean() > 0.5
            away = (labels["normals"] * rays).sum(axis=-1) > 0
            assert away[known].mean() < 0.001
            assert 0.5 < labels["depth"].mean() < 10
            assert 0 < labels["boundary"].mean() < 0.3
            assert len(np.unique(labels["segmentation"])) > 3
