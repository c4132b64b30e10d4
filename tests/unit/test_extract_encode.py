"""Encoding in torch gives what the codecs of the store give."""

from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.averaging import area_average
from stages.decode import decoder
from stages.extract.encode import Encoder, are_sound, refuse_unstorable
from stages.extract.errors import NonFiniteFeaturesError
from stages.extract.moments import token_moments
from stages.extract.teachers import Features
from store.codecs import Codec, FloatCodec
from store.create import create_store
from store.errors import StoreError
from store.pyramid import area_average as reference_average
from store.sizes import future_record
from store.spec import GLOBAL, TeacherSpec
from store.statistics import Moments
from store.teacher_layout import TeacherLayout
from store.testing import (
    file_digests,
    sample_codecs,
    sample_features,
    sample_images,
    sample_teacher,
    sample_views,
)
from store.verify import verify
from store.writer import FeatureWriter

CODECS = ["float16", "float32", "int8", "int8-pca", "int8-pca4", "pca-2bit",
          "pca-4bit", "pca-6bit"]  # fmt: skip


def encoder_of(spec: TeacherSpec, covariance: bool = False) -> tuple[Encoder, dict[str, Codec]]:
    fitted = sample_codecs(spec)
    floats = FloatCodec(dtype="<f4" if spec.codec == "float32" else "<f2")
    codecs: dict[str, Codec] = {target.name: floats for target in spec.targets}
    codecs |= {GLOBAL: floats, **{name: one.codec for name, one in fitted.items()}}
    layout: TeacherLayout = future_record(spec, fitted, 8, 2**40, covariance=covariance).layout
    return Encoder(layout, codecs), codecs


def features_of(spec: TeacherSpec, rows: range) -> Features:
    values = {name: torch.from_numpy(one) for name, one in sample_features(spec, rows).items()}
    return Features(pooled=values.pop(GLOBAL, None), levels=values)


@pytest.mark.parametrize("codec", CODECS)
def test_codes_are_those_of_the_codec(codec: str) -> None:
    spec = sample_teacher(codec=codec, pyramid=True)
    encoder, codecs = encoder_of(spec)
    features = features_of(spec, range(3, 8))
    found = encoder(features, np.ones(5, bool)).codes
    assert found.keys() == {GLOBAL, *(target.name for target in spec.targets)}
    for target in spec.targets:
        rows = features.levels[target.level].numpy()
        expected = [codecs[target.name].encode(reference_average(row, target.grid)) for row in rows]
        rounding = 1e-6 if codec == "float32" else 0  # of the averages over cells
        np.testing.assert_allclose(found[target.name], np.stack(expected), rtol=rounding)
    assert features.pooled is not None
    np.testing.assert_array_equal(
        found[GLOBAL], features.pooled.numpy().astype(found[GLOBAL].dtype)
    )


def test_rows_without_features_are_zeros() -> None:
    spec = sample_teacher(codec="int8")
    encoder, _ = encoder_of(spec)
    valid = np.array([True, False, True])
    features = features_of(spec, range(2))
    found = encoder(features, valid).codes
    alone = encoder(features, np.ones(2, bool)).codes
    for name, codes in found.items():
        np.testing.assert_array_equal(codes[valid], alone[name])
        assert not codes[1].any()
    for codes in encoder(None, np.zeros(4, bool)).codes.values():
        assert len(codes) == 4
        assert not codes.any()


@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)), data=st.data(), seed=st.integers(0, 99)
)
def test_area_average_is_that_of_the_store(
    size: tuple[int, int], data: st.DataObject, seed: int
) -> None:
    grid = data.draw(st.tuples(st.integers(1, size[0]), st.integers(1, size[1])))
    values = np.random.default_rng(seed).standard_normal((2, *size, 3), np.float32)
    found = area_average(torch.from_numpy(values), grid).numpy()
    expected = np.stack([reference_average(row, grid) for row in values])
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("codec", "value", "refused"),
    [("float16", 7e4, True), ("float32", 7e4, False), ("int8", 7e4, False),
     ("float32", np.nan, True), ("int8", -np.inf, True), ("float16", -6e4, False),
     ("float16", np.nan, True)],
)  # fmt: skip
def test_what_cannot_be_stored_is_refused_by_name(codec: str, value: float, refused: bool) -> None:
    spec = sample_teacher(codec=codec)
    features = features_of(spec, range(2))
    features.levels["stage_2"][1, 0, 1, 2] = value
    encoded = encoder_of(spec)[0](features, np.ones(2, np.bool_))
    assert are_sound(encoded) == (codec == "float16" and not refused)
    if not refused:
        refuse_unstorable(features, spec, ["a", "b"])
        return
    with pytest.raises(NonFiniteFeaturesError, match=r"stage_2: .* for b"):
        refuse_unstorable(features, spec, ["a", "b"])


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("covariance", [False, True])
def test_moments_on_another_device_are_those_of_a_processor(codec: str, covariance: bool) -> None:
    spec = sample_teacher(codec=codec, pyramid=True)
    encoder, codecs = encoder_of(spec, covariance=covariance)
    found = encoder(features_of(spec, range(3, 8)), np.ones(5, bool))
    for target in spec.targets:
        decode = decoder(codecs[target.name], torch.device("cpu"))
        values = decode(torch.from_numpy(found.codes[target.name]))
        rows = [codecs[target.name].decode(row) for row in found.codes[target.name]]
        np.testing.assert_allclose(values, np.stack(rows), rtol=2e-5, atol=1e-6)
        elsewhere = reduce(Moments.merge, token_moments(values, covariance))
        nothing = Moments.empty(target.channels, covariance)
        here = reduce(Moments.merge, found.moments[target.name], nothing)
        assert elsewhere.count == here.count == 5 * target.grid[0] * target.grid[1]
        np.testing.assert_allclose(elsewhere.mean, here.mean, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(elsewhere.m2, here.m2, rtol=1e-5, atol=1e-5 * here.m2.max())
        assert (here.comoment is not None) == (elsewhere.comoment is not None) == covariance
        if here.comoment is not None and elsewhere.comoment is not None:
            scale = here.m2.max()
            np.testing.assert_allclose(elsewhere.comoment, here.comoment, atol=1e-5 * scale)
            np.testing.assert_array_equal(np.diagonal(elsewhere.comoment), elsewhere.m2)


@pytest.mark.parametrize("codec", ["float16", "int8", "pca-4bit"])
@pytest.mark.parametrize("covariance", [False, True])
def test_a_store_of_codes_is_that_of_features(codec: str, covariance: bool, tmp_path: Path) -> None:
    """Row by row the same sums, though here they come with the codes, there from the writer."""
    spec = sample_teacher(codec=codec)
    for name in ("codes", "features"):
        path = tmp_path / name / "store"
        create_store(path, sample_images(6, quarantined=[2]), sample_views(6))
        with FeatureWriter.open(
            path, spec, 2**20, covariance=covariance, calibrate=lambda: sample_codecs(spec)
        ) as writer:
            valid = np.array([True, True, False, True, True, True])
            rows = sample_features(spec, range(6))
            pooled = rows.pop(GLOBAL)
            if name == "features":
                writer.write(range(6), rows, pooled, valid)
            else:
                levels = {level: torch.from_numpy(one[valid]) for level, one in rows.items()}
                features = Features(levels=levels, pooled=torch.from_numpy(pooled[valid]))
                encoded = Encoder(writer.layout, writer.codecs)(features, valid)
                writer.write_codes(range(6), encoded.codes, encoded.moments, valid)
            writer.finish()
        # Six rows of noise have outliers; every sum and every byte has to be right.
        assert {one.check for one in verify(path).findings} <= {"features"}
    assert file_digests(tmp_path / "codes") == file_digests(tmp_path / "features")


def test_what_is_not_of_these_rows_is_refused(tmp_path: Path) -> None:
    spec = sample_teacher()
    create_store(tmp_path / "store", sample_images(4), sample_views(4))
    with FeatureWriter.open(tmp_path / "store", spec) as writer:
        encoder = Encoder(writer.layout, writer.codecs)
        valid = np.ones(4, bool)
        encoded = encoder(features_of(spec, range(4)), valid)
        moments, codes = encoded.moments, encoded.codes
        fewer = encoder(features_of(spec, range(3)), valid[:3])
        name, parts = next(iter((key, list(value)) for key, value in moments.items()))
        bad = [replace(parts[0], m2=parts[0].m2 * value) for value in (np.nan, np.inf, -1.0)] + [
            replace(parts[0], mean=parts[0].mean[:-1])
        ]
        wrong: list[tuple[range, Any, Any, Any, str]] = [
            (range(4), codes, fewer.moments, valid, "valid rows have"),
            (range(4), codes, {}, valid, "valid rows have"),
            *(
                (range(4), codes, {**moments, name: [one, *parts[1:]]}, valid, "moments")
                for one in bad
            ),
            (range(2), codes, moments, valid, "valid must be bool of shape"),
            (range(4), fewer.codes, fewer.moments, valid[:3], "valid must be bool of shape"),
            (range(0), codes, moments, valid[:0], "are no rows"),
        ]
        for rows, some, sums, marks, message in wrong:
            with pytest.raises(StoreError, match=message):
                writer.write_codes(rows, some, sums, marks)
        writer.write_codes(range(4), codes, moments, valid)
        writer.finish()
    assert {one.check for one in verify(tmp_path / "store").findings} <= {"features"}
