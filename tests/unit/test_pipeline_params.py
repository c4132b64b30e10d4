"""The parameter file: every mistake at once, each with the nearest right name."""

from pathlib import Path

import pytest
import yaml

from pipeline.params import ParamsError, load_params

ROOT = Path(__file__).parents[2]
SHIPPED = [ROOT / "params.yaml"]
"""Recipes are tried in test_recipes.py."""


def changed(tmp_path: Path, section: str | None, **values: object) -> Path:
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    (params[section] if section else params).update(values)
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(params))
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_files_are_valid(path: Path) -> None:
    params = load_params(path)
    assert params.teachers
    assert params.image_size[0] > 0


def test_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    path = changed(tmp_path, "distill", learning_rte=0.1)
    with pytest.raises(ParamsError, match=r"distill\.learning_rte.*did you mean 'learning_rate'"):
        load_params(path)


def test_unknown_key_inside_a_teacher_and_inside_the_data(tmp_path: Path) -> None:
    path = changed(tmp_path, None, teachers={"mae": {"source": "timm:resnet18", "chekpoint": "x"}})
    with pytest.raises(ParamsError, match=r"teachers\.mae\.chekpoint.*'checkpoint'"):
        load_params(path)
    path = changed(tmp_path, "data", rooot="elsewhere")
    with pytest.raises(ParamsError, match=r"data\.scenes\.rooot.*'root'"):
        load_params(path)


def test_unknown_key_in_a_section_that_may_be_left_out(tmp_path: Path) -> None:
    path = changed(tmp_path, None, views={"count": 2, "photometric": {"brightnes": 0.1}})
    with pytest.raises(ParamsError, match=r"views\.photometric\.brightnes.*'brightness'"):
        load_params(path)


@pytest.mark.parametrize("teachers", [{}, None, []])
def test_no_teachers(tmp_path: Path, teachers: object) -> None:
    path = changed(tmp_path, None, teachers=teachers)
    with pytest.raises(ParamsError, match=r"name at least one, got [^;]*; for example"):
        load_params(path)


def test_reuse_wants_a_cosine_above_zero(tmp_path: Path) -> None:
    path = changed(tmp_path, "distill", reuse={"flip": -1.0})
    with pytest.raises(ParamsError, match=r"reuse\.flip: .* greater than 0, got -1"):
        load_params(path)


def test_all_mistakes_are_reported_together(tmp_path: Path) -> None:
    path = changed(tmp_path, "distill", steps=0, batch_size="many", warm_up=3)
    with pytest.raises(ParamsError) as caught:
        load_params(path)
    message = str(caught.value)
    assert "3 mistake(s)" in message
    for part in ("distill.steps", "distill.batch_size", "'many'", "'warmup_steps'"):
        assert part in message


def test_number_that_yaml_reads_as_text_gets_the_remedy(tmp_path: Path) -> None:
    text = (
        (ROOT / "params.yaml").read_text().replace("learning_rate: 1.0e-3", "learning_rate: 1e-3")
    )
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(ParamsError, match=r"distill\.learning_rate.*write 1\.0e-3"):
        load_params(path)


def test_missing_section_and_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    with pytest.raises(ParamsError, match="no parameter file"):
        load_params(path)
    path.write_text("image_size: [32, 32]\n")
    with pytest.raises(ParamsError, match="store: missing"):
        load_params(path)


@pytest.mark.parametrize("text", ["a: [1", "- just\n- a list\n", "", "image_size: 2026-01-01\n"])
def test_what_is_no_parameter_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(ParamsError):
        load_params(path)
