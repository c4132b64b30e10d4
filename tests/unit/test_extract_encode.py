"""Encoding in torch gives what the codecs of the store give."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.extract.encode import Encoder, area_average, refuse_unstorable
from stages.extract.errors import NonFiniteFeaturesError
from stages.extract.teachers import Features
from store.codecs import Codec, FloatCodec
from store.pyramid import area_average as reference_average
from store.sizes import future_record
from store.spec import GLOBAL, TeacherSpec
from store.teacher_layout import TeacherLayout
from store.testing import sample_codecs, sample_features, sample_teacher

CODECS = ["float16", "float32", "int8", "int8-pca", "int8-pca4", "pca-2bit",
          "pca-4bit", "pca-6bit"]  # fmt: skip


def encoder_of(spec: TeacherSpec) -> tuple[Encoder, dict[str, Codec]]:
    fitted = sample_codecs(spec)
    floats = FloatCodec(dtype="<f4" if spec.codec == "float32" else "<f2")
    codecs: dict[str, Codec] = {target.name: floats for target in spec.targets}
    codecs |= {GLOBAL: floats, **{name: one.codec for name, one in fitted.items()}}
    layout: TeacherLayout = future_record(spec, fitted, 8, 2**40, covariance=False).layout
    return Encoder(spec, layout.features(), codecs), codecs


def features_of(spec: TeacherSpec, rows: range) -> Features:
    values = {name: torch.from_numpy(one) for name, one in sample_features(spec, rows).items()}
    return Features(pooled=values.pop(GLOBAL, None), levels=values)


@pytest.mark.parametrize("codec", CODECS)
def test_codes_are_those_of_the_codec(codec: str) -> None:
    spec = sample_teacher(codec=codec, pyramid=True)
    encoder, codecs = encoder_of(spec)
    features = features_of(spec, range(3, 8))
    found = encoder(features, np.ones(5, bool))
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
    found = encoder(features, valid)
    alone = encoder(features, np.ones(2, bool))
    for name, codes in found.items():
        np.testing.assert_array_equal(codes[valid], alone[name])
        assert not codes[1].any()
    for codes in encoder(None, np.zeros(4, bool)).values():
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
     ("float32", np.nan, True), ("int8", -np.inf, True), ("float16", -6e4, False)],
)  # fmt: skip
def test_what_cannot_be_stored_is_refused_by_name(codec: str, value: float, refused: bool) -> None:
    spec = sample_teacher(codec=codec)
    features = features_of(spec, range(2))
    features.levels["stage_2"][1, 0, 1, 2] = value
    if not refused:
        refuse_unstorable(features, spec, ["a", "b"])
        return
    with pytest.raises(NonFiniteFeaturesError, match=r"stage_2: .* for b"):
        refuse_unstorable(features, spec, ["a", "b"])
