"""Teachers known by name, and a short account of those a person has configured.

Any other model of timm or open_clip works as well; this is a list of suggestions, not a registry.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from stages.extract.config import TeacherConfig
from stages.extract.entry_points import custom_teachers


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherDescription:
    """One line of `sak teachers`; `input_size` is the recommended setting."""

    name: str
    source: str
    licence: str
    input_size: str
    note: str


def _timm(name: str, model: str, licence: str, note: str, size: str = "view") -> TeacherDescription:
    return TeacherDescription(
        name=name, source=f"timm:{model}", licence=licence, input_size=size, note=note
    )


def _open_clip(name: str, model: str, note: str) -> TeacherDescription:
    return TeacherDescription(
        name=name,
        source=f"open_clip:{model}",
        licence="see model card",
        input_size="view",
        note=note,
    )


_APACHE = "apache-2.0"
_DINOV2 = "self-supervised; semantics and parts; the paper's first teacher"
_CLIP = "LAION-2B image-text, then ImageNet labels; the paper's second teacher"
_SAM = "promptable masks; edges and normals; the paper's third teacher, at 1024 pixels"

KNOWN_TEACHERS: tuple[TeacherDescription, ...] = (
    _timm("dinov2-b", "vit_base_patch14_dinov2.lvd142m", _APACHE, _DINOV2),
    _timm("dinov2-l", "vit_large_patch14_dinov2.lvd142m", _APACHE, _DINOV2),
    _timm("clip-b", "vit_base_patch16_clip_384.laion2b_ft_in12k_in1k", _APACHE, _CLIP),
    _timm("clip-l", "vit_large_patch14_clip_336.laion2b_ft_in12k_in1k", _APACHE, _CLIP),
    _timm("sam-b", "samvit_base_patch16.sa1b", _APACHE, _SAM, "native"),
    _timm("sam-l", "samvit_large_patch16.sa1b", _APACHE, _SAM, "native"),
    _open_clip("openclip-b", "ViT-B-16/laion2b_s34b_b88k", "image-text only, no labels"),
    _open_clip("openai-clip-b", "ViT-B-16/openai", "the first CLIP, image-text only"),
    _timm("siglip2-b", "vit_base_patch16_siglip_384.v2_webli", _APACHE, "image-text, sigmoid loss"),
    _timm(
        "dinov3-b", "vit_base_patch16_dinov3.lvd1689m", "dinov3-license", "self-supervised, dense"
    ),
    _timm(
        "radio-b",
        "vit_base_patch16_radio_v3.c_radio",
        "nvidia-open-model-license",
        "itself distilled from DINO, SigLIP and SAM",
    ),
)


def describe_teachers(configs: Mapping[str, TeacherConfig]) -> tuple[TeacherDescription, ...]:
    """Return the configured teachers, then those of installed packages and the known ones."""
    licences = {known.source: known.licence for known in KNOWN_TEACHERS}
    configured = tuple(
        TeacherDescription(
            name=name,
            source=config.source,
            licence=licences.get(config.source, "see model card"),
            input_size=_size(config),
            note=_weights(config),
        )
        for name, config in configs.items()
    )
    sources = {config.source for config in configs.values()}
    offered = tuple(_offered(name, value) for name, value in custom_teachers().items())
    known = (one for one in (*offered, *KNOWN_TEACHERS) if one.source not in sources)
    return configured + tuple(known)


def _offered(name: str, value: str) -> TeacherDescription:
    """One line for a teacher that an installed package offers."""
    return TeacherDescription(
        name=name,
        source=f"custom:{name}",
        licence="see package",
        input_size="view",
        note=f"offered by an installed package, {value}",
    )


def _size(config: TeacherConfig) -> str:
    size = config.input_size
    return size if isinstance(size, str) else f"{size[0]} x {size[1]}"


def _weights(config: TeacherConfig) -> str:
    if config.checkpoint is None and config.source.startswith("custom:"):
        return "configured; weights of its class"
    if config.checkpoint is None:
        return "configured; weights from the Hugging Face hub"
    if not isinstance(config.checkpoint, Path):
        return "configured; random weights"
    found = "" if config.checkpoint.is_file() else ", which is not there"
    return f"configured; weights {config.checkpoint}{found}"
