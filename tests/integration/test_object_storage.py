"""Images to a trained student with the features in a bucket, through the commands."""

import json
from pathlib import Path

import boto3
import numpy as np
import yaml

from pipeline.testing import sak
from store.reader import FeatureStore


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
