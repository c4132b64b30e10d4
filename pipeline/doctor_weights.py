"""What `sak doctor` asks about a teacher's weights: on this machine, or to be had, or not at all.

Nothing is downloaded. Weights that are here are loaded, which shows whether they fit.
"""

import socket
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import huggingface_hub
import open_clip
import timm.models
import torch
from huggingface_hub import errors
from rich.filesize import decimal

from pipeline.doctor_check import Check, fail, ok
from stages.extract.config import TeacherConfig
from stages.extract.errors import TeacherError
from stages.extract.teachers import load_teacher
from store.spec import TeacherSpec

SECONDS = 5.0
"""How long a server may take to answer."""

_HUB_NAMES = {
    "timm": ("model.safetensors", "pytorch_model.bin"),
    "open_clip": ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Published:
    """Where a library keeps weights: a repository of the hub with file names, or an address."""

    repository: str = ""
    revision: str | None = None
    names: tuple[str, ...] = ()
    url: str = ""


def check_teacher(
    name: str, config: TeacherConfig, image_size: tuple[int, int]
) -> tuple[Check, TeacherSpec | None]:
    """Return the check of a teacher's weights, and what it gives where it could be loaded."""
    label = f"teacher {name}"
    published = None if config.checkpoint is not None else _published(config.source)
    if published is not None and not _is_here(published):
        return _reach(label, published), None
    try:
        teacher = load_teacher(name, config, image_size, torch.device("cpu"))
    except TeacherError as error:
        first, _, rest = str(error).partition("\n")
        return fail(
            label, first, rest.strip() or "correct this teacher in the parameter file"
        ), None
    levels = len(teacher.spec.levels)
    return ok(label, f"{config.source}: weights are here and fit, {levels} levels"), teacher.spec


def _published(source: str) -> _Published | None:
    """Return where the weights are published; None where only loading can tell."""
    library, _, model = source.partition(":")
    if library == "timm":
        config = timm.models.get_pretrained_cfg(model)
        if config is None:
            return None
        hub, name, url = config.hf_hub_id or "", config.hf_hub_filename or "", str(config.url or "")
    elif library == "open_clip":
        architecture, _, tag = model.partition("/")
        told = open_clip.get_pretrained_cfg(architecture, tag)
        hub, _, name = str(told.get("hf_hub", "")).rpartition("/")
        url = str(told.get("url", ""))
    else:
        return None
    if hub:
        repository, _, revision = hub.partition("@")
        names = (name,) if name else _HUB_NAMES[library]
        return _Published(repository=repository, revision=revision or None, names=names)
    return _Published(url=url) if url else None


def _is_here(published: _Published) -> bool:
    if published.url:
        name = urlsplit(published.url).path.rpartition("/")[2]
        return Path(torch.hub.get_dir(), "checkpoints", name).exists()
    return any(
        isinstance(
            huggingface_hub.try_to_load_from_cache(
                published.repository, name, revision=published.revision
            ),
            str,
        )
        for name in published.names
    )


def _reach(label: str, published: _Published) -> Check:
    if published.url:
        return _reach_url(label, published.url)
    where = f"https://huggingface.co/{published.repository}"
    place = (
        "run once on a machine with internet and copy its hub cache, or set `checkpoint:` of this "
        f"teacher to {published.names[0]} of {where}"
    )
    if not _answers(huggingface_hub.constants.ENDPOINT):
        return fail(label, f"weights are not here, and {where} cannot be reached", place)
    for name in published.names:
        url = huggingface_hub.hf_hub_url(published.repository, name, revision=published.revision)
        try:
            told = huggingface_hub.get_hf_file_metadata(url, timeout=SECONDS)
        except errors.EntryNotFoundError:
            continue
        except errors.GatedRepoError:
            advice = f"accept its conditions at {where}, then `hf auth login` with a token of yours"
            return fail(label, f"{where} is gated, and you have no access", advice)
        except errors.RepositoryNotFoundError:
            advice = "correct `source:`, or `hf auth login` where it is private"
            return fail(label, f"{where} does not exist, or is private", advice)
        except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled, OSError) as error:
            found = f"weights are not here, and {where} does not answer ({type(error).__name__})"
            return fail(label, found, place)
        return ok(label, f"{decimal(told.size or 0)} to download from {where}")
    return fail(label, f"{where} has no {' or '.join(published.names)}", place)


def _reach_url(label: str, url: str) -> Check:
    place = f"fetch {url} by other means, and set `checkpoint:` of this teacher to its path"
    request = urllib.request.Request(url, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            size = int(answer.headers.get("Content-Length", 0))
    except (urllib.error.URLError, OSError) as error:
        return fail(label, f"weights are not here, and {url} cannot be reached ({error})", place)
    return ok(label, f"{decimal(size)} to download from {url}")


def _answers(address: str) -> bool:
    """Tell whether somebody listens; the hub's own client tries again for a long time."""
    parts = urlsplit(address)
    if urllib.request.getproxies().get(parts.scheme):
        return True  # only the proxy knows
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        with socket.create_connection((parts.hostname or "", port), timeout=SECONDS):
            return True
    except OSError:
        return False
