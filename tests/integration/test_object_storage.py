"""Images to a trained student with the features in a bucket, through the commands."""

import json
from pathlib import Path

import boto3
import numpy as np
import pytest
import yaml

from pipeline.testing import sak, sak_json
from store.reader import FeatureStore
from store.testing import file_contents


def test_commands_take_a_url(s3_endpoint: str, tiny_params: Path, tmp_path: Path) -> None:
    bucket = "s3://bucket"
    boto3.client("s3").create_bucket(Bucket="bucket")
    options = ("--params", tiny_params, "--json")
    local = yaml.safe_load(tiny_params.read_text())["store"]
    sak("index", *options)
    sak("extract-teachers", "first", *options)

    url = f"{bucket}/some/where/features.zarr"
    params = yaml.safe_load(tiny_params.read_text()) | {"store": url}
    tiny_params.write_text(yaml.safe_dump(params))
    assert json.loads(sak("index", *options))["store"] == url
    sak("index", *options)
    extracted = json.loads(sak("extract-teachers", *options))["teachers"]
    assert [entry["images"] for entry in extracted] == [9, 9]
    again = json.loads(sak("extract-teachers", "first", *options))["teachers"]
    assert [entry["images"] for entry in again] == [0]

    store = json.loads(sak("inspect", url, "--json"))
    assert store["path"] == url
    assert [teacher["coverage"] for teacher in store["teachers"]] == [1.0, 1.0]
    rows = range(9)
    level = FeatureStore(url).levels("first")[0]
    np.testing.assert_array_equal(
        FeatureStore(url).read("first", level, rows), FeatureStore(local).read("first", level, rows)
    )

    assert json.loads(sak("train-student", "distill", *options))["steps"] == 3

    params["teachers"]["first"]["levels"] = [0, 1]
    tiny_params.write_text(yaml.safe_dump(params))
    assert "--replace" in sak("extract-teachers", "first", *options, code=2)
    replaced = json.loads(sak("extract-teachers", "first", "--replace", *options))["teachers"]
    assert [entry["images"] for entry in replaced] == [9]
    assert len(FeatureStore(url).levels("first")) < len(FeatureStore(local).levels("first"))
    assert not (tmp_path / "s3:").exists()
    assert "no feature store at s3://bucket/other" in sak("inspect", f"{bucket}/other", code=2)


@pytest.mark.slow  # moto answers thousands of requests of both workers in one thread: 50 s
def test_worker_processes_fill_a_store_in_a_bucket(
    s3_endpoint: str, tiny_params: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of dask's workers at one bucket: each shard written once, the bytes those of a folder."""
    monkeypatch.setattr("store.teacher_layout.MAX_ROWS_PER_SHARD", 2)
    preload = tmp_path / "preload.py"
    preload.write_text("import store.teacher_layout\nstore.teacher_layout.MAX_ROWS_PER_SHARD = 2\n")
    monkeypatch.setenv("DASK_DISTRIBUTED__WORKER__PRELOAD", json.dumps([str(preload)]))
    boto3.client("s3").create_bucket(Bucket="workers")
    params = yaml.safe_load(tiny_params.read_text())
    local, url = params["store"], "s3://workers/features.zarr"
    sak("index", "--params", tiny_params)
    sak("extract-teachers", "first", "--params", tiny_params)
    tiny_params.write_text(yaml.safe_dump(params | {"store": url}))
    sak("index", "--params", tiny_params)
    command = ("extract-teachers", "first", "--workers", "2", "--params", tiny_params)
    (summary,) = sak_json(*command)["teachers"]
    assert (summary["images"], summary["shards_written"]) == (9, 5)
    assert sak_json(*command)["teachers"][0]["already_there"] == 9
    objects = boto3.client("s3").list_objects_v2(Bucket="workers")["Contents"]
    written = {
        one["Key"].removeprefix("features.zarr/"): boto3.client("s3")
        .get_object(Bucket="workers", Key=one["Key"])["Body"]
        .read()
        for one in objects
    }
    assert written == file_contents(Path(local))
