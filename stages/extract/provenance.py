"""What is known of a teacher before its weights are in memory: its source and preprocessing."""

import hashlib
import json
from pathlib import Path
from typing import Any, get_args

from stages.data.view import Resample
from stages.extract.config import TeacherConfig
from stages.extract.custom import CustomSource
from stages.extract.errors import TeacherError
from stages.extract.geometry import plan_input
from stages.extract.network import NetworkSource, Outline
from stages.extract.preprocess import Preprocessing, probe_digest
from stages.extract.timm_networks import TimmSource
from store.spec import canonical_json

CODE_VERSION = 2
"""Raise it when the same weights and settings give other features than before."""


def foreseen_provenance(config: TeacherConfig, image_size: tuple[int, int]) -> dict[str, Any]:
    """Return what a teacher's provenance must say if it were extracted now, as plain JSON.

    Only what is known without its weights in memory: how images are prepared, the version of our
    code, the digest of the checkpoint's file where that is on this machine.

    Raises:
        TeacherError: unknown model.
    """
    outline = network_source(config).outline()
    foreseen = known_provenance(
        config, choose_preprocessing(config, outline, image_size), image_size
    )
    if "custom_code" in outline.facts:
        foreseen["custom_code"] = outline.facts["custom_code"]
    known: dict[str, Any] = json.loads(canonical_json(foreseen))
    return known


def known_provenance(
    config: TeacherConfig, preprocessing: Preprocessing, image_size: tuple[int, int]
) -> dict[str, Any]:
    """Return the part of the provenance that is known before a teacher is built."""
    checkpoint = {}
    if isinstance(config.checkpoint, Path) and config.checkpoint.is_file():
        with config.checkpoint.open("rb") as file:
            checkpoint["checkpoint_sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "preprocessing": _described(preprocessing),
        "probe_sha256": probe_digest(preprocessing, image_size),
        "code_version": CODE_VERSION,
        **checkpoint,
    }


def choose_preprocessing(
    config: TeacherConfig, outline: Outline, image_size: tuple[int, int]
) -> Preprocessing:
    """Return how views of `image_size` (height, width) become the network's input.

    Raises:
        TeacherError: the model states an interpolation that we do not have.
    """
    multiple = max(outline.reductions)
    return Preprocessing(
        frame=plan_input(config.input_size, image_size, outline.native, multiple),
        mean=config.mean or outline.mean,
        std=config.std or outline.std,
        interpolation=config.interpolation or _known_interpolation(outline),
    )


def network_source(config: TeacherConfig) -> NetworkSource:
    """Return the model that a configuration names; nothing is built yet."""
    library, _, name = config.source.partition(":")
    if library == "timm":
        return TimmSource(name=name, checkpoint=config.checkpoint, model_args=config.model_args)
    if library == "custom":
        return CustomSource(name=name, checkpoint=config.checkpoint, model_args=config.model_args)
    model, _, tag = name.partition("/")
    from stages.extract.open_clip_networks import OpenClipSource  # only where it is asked for

    return OpenClipSource(
        name=model, tag=tag, checkpoint=config.checkpoint, model_args=config.model_args
    )


def _known_interpolation(outline: Outline) -> Resample:
    known: tuple[Resample, ...] = get_args(Resample)
    for name in known:
        if outline.interpolation == name:
            return name
    raise TeacherError(
        f"the model states interpolation {outline.interpolation!r}; set the teacher's "
        f"`interpolation:` to one of {', '.join(known)}"
    )


def _described(preprocessing: Preprocessing) -> dict[str, Any]:
    return {
        "input_size": preprocessing.frame.size,
        "content_size": preprocessing.frame.content,
        "mean": preprocessing.mean,
        "std": preprocessing.std,
        "interpolation": preprocessing.interpolation,
    }
