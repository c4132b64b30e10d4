from pathlib import Path

import open_clip
import pytest
import timm

from stages.extract.config import TeacherConfig
from stages.extract.known import KNOWN_TEACHERS, TeacherDescription, describe_teachers
from stages.extract.levels import choose_taps, is_staged
from stages.extract.provenance import network_source


@pytest.mark.parametrize("teacher", KNOWN_TEACHERS, ids=lambda teacher: teacher.name)
def test_known_teachers_exist_with_the_licence_stated(teacher: TeacherDescription) -> None:
    config = TeacherConfig(source=teacher.source)
    library, _, name = config.source.partition(":")
    if library == "timm":
        assert timm.models.is_model_pretrained(name)
        assert timm.models.get_pretrained_cfg(name).license == teacher.licence
    else:
        assert tuple(name.split("/")) in open_clip.list_pretrained()


@pytest.mark.parametrize("teacher", KNOWN_TEACHERS, ids=lambda teacher: teacher.name)
def test_known_teachers_can_be_tapped_at_four_blocks(teacher: TeacherDescription) -> None:
    outline = network_source(TeacherConfig(source=teacher.source)).outline()
    assert len(choose_taps(4, outline.reductions)) == 4
    assert not is_staged(outline.reductions)
    assert outline.native[0] >= 224
    assert outline.interpolation == "bicubic"
    assert outline.facts["licence"] in (teacher.licence, None)


def test_names_of_known_teachers_differ() -> None:
    assert len({teacher.name for teacher in KNOWN_TEACHERS}) == len(KNOWN_TEACHERS)


def test_configured_teachers_come_first_and_say_where_their_weights_are(tmp_path: Path) -> None:
    there = tmp_path / "a.safetensors"
    there.touch()
    configs = {
        "mine": TeacherConfig(source="timm:resnet18", checkpoint=there, input_size=(64, 96)),
        "lost": TeacherConfig(source="timm:resnet18", checkpoint=tmp_path / "b.safetensors"),
        "toy": TeacherConfig(source="timm:resnet18", checkpoint="random", input_size="native"),
        "dino": TeacherConfig(source=KNOWN_TEACHERS[0].source),
    }
    mine, lost, toy, dino, *others = describe_teachers(configs)
    assert mine.input_size == "64 x 96"
    assert mine.note.endswith("a.safetensors")
    assert lost.note.endswith("b.safetensors, which is not there")
    assert "random" in toy.note
    assert dino.licence == "apache-2.0"
    assert "hub" in dino.note
    assert [other.name for other in others] == [known.name for known in KNOWN_TEACHERS[1:]]
