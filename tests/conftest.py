"""Fixtures that several parts share: a project small enough to run end to end in seconds."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from stages.memory import keep_freed_memory

keep_freed_memory()

TINY_VIT = {"patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2}


def tiny_project(folder: Path) -> dict[str, Any]:
    """Parameters of a whole run inside `folder`: nine scenes, two random teachers, two tasks."""
    teacher = {
        "source": "timm:vit_tiny_patch16_224", "model_args": TINY_VIT, "checkpoint": "random"
    }  # fmt: skip
    phase = {"steps": 3, "batch_size": 2, "learning_rate": 0.001, "log_every": 1}
    return {
        "image_size": [32, 48],
        "data": {"kind": "scenes", "root": str(folder / "scenes"), "train": 6, "val": 3, "seed": 1},
        "views": {"count": 1},
        "tasks": ["segmentation", "depth"],
        "store": str(folder / "features.zarr"),
        "runs": str(folder / "runs"),
        "report": str(folder / "report"),
        "teachers": {"first": teacher, "second": {**teacher, "levels": [0, 1, 2, 3]}},
        "extract": {"batch_size": 4},
        "student": {"model": "vit_tiny_patch16_224", "model_args": TINY_VIT},
        "runtime": {"device": "cpu", "precision": "fp32", "seed": 0},
        "distill": phase,
        "multitask": {**phase, "schedule": "poly", "gradient_clip": 10.0},
    }


@pytest.fixture
def tiny_params(tmp_path: Path) -> Path:
    """Path of a written parameter file for `tiny_project`."""
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(tiny_project(tmp_path)))
    return path


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """Address of an S3 server of our own, where the environment sends every client.

    One for the session, because s3fs keeps a client for as long as the process lives.
    """
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # else a line per request
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield f"http://{host}:{port}"
    server.stop()
