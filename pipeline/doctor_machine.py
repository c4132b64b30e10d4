"""What `sak doctor` asks of the machine: libraries, processors, memory, GPU, tools, disk."""

import importlib.metadata
import os
import re
import shutil
import sys
from pathlib import Path

from packaging.requirements import Requirement
from rich.filesize import decimal

from pipeline.doctor_check import Check, fail, ok, warn
from store.disk import RESERVE_BYTES, existing_parent, measure_disk

DISTRIBUTION = "sak-distill"
CGROUP = Path("/sys/fs/cgroup")
DRIVER = Path("/proc/driver/nvidia/version")
_GIB = 2**30
_LEAST_MEMORY = 4 * _GIB  # two ViT-B teachers and their batches
_LEAST_RATE = 50e6  # bytes per second
_TRIAL = 64 * 2**20
_NO_LIMIT = 2**60  # cgroup 1 writes a huge number where there is none


def machine_checks() -> list[Check]:
    """Return the checks that need no parameter file."""
    return [check_python(), check_libraries(), check_processors(), check_memory(),
            check_gpu("auto"), *check_tools()]  # fmt: skip


def check_python() -> Check:
    """Python's version against the least one that the project states."""
    wanted = importlib.metadata.metadata(DISTRIBUTION)["Requires-Python"]
    here = ".".join(map(str, sys.version_info[:3]))
    if Requirement(f"python{wanted}").specifier.contains(here):
        return ok("python", here)
    return fail("python", here, f"wanted is {wanted}: make PYTHON=python3.12")


def check_libraries() -> Check:
    """Every library that the project needs, at or above its floor."""
    needed = [Requirement(text) for text in importlib.metadata.requires(DISTRIBUTION) or ()]
    always = [one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    wrong = [text for one in always if (text := _wrong_version(one))]
    if wrong:
        return fail("libraries", "; ".join(wrong), "remove .venv and run `make .venv/ready`")
    return ok("libraries", f"{len(always)} installed, none below its floor")


def _wrong_version(needed: Requirement) -> str:
    try:
        here = importlib.metadata.version(needed.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{needed.name} is not installed (wanted {needed.specifier})"
    fits = needed.specifier.contains(here, prereleases=True)
    return "" if fits else f"{needed.name} is {here} (wanted {needed.specifier})"


def check_processors() -> Check:
    """Processors that this process may use, by affinity and by its control group."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota = _cpu_quota()
    if quota is not None and quota < count:
        advice = f"set OMP_NUM_THREADS={max(1, round(quota))}, or more threads only wait"
        return warn("processors", f"{count}, of which the container gets {quota:g}", advice)
    return ok("processors", str(count))


def check_memory() -> Check:
    """Free memory, and the limit of the control group where it is lower."""
    free = _meminfo().get("MemAvailable")
    limit = _memory_limit()
    if free is None and limit is None:
        return warn("memory", "not known on this system", "see that some GB are free")
    room = min(value for value in (free, limit) if value is not None)
    found = f"{decimal(room)} free" if room == free else f"the container gets {decimal(room)}"
    if room < _LEAST_MEMORY:
        return warn("memory", found, "use smaller batches (extract: batch_size), or more memory")
    return ok("memory", found)


def check_gpu(device: str) -> Check:
    """The GPU that torch sees and its driver; `device` is what the parameter file asks for."""
    import torch

    driver = _driver()
    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
        found = f"{', '.join(sorted(names))}, driver {driver or 'unknown'}"
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return ok("gpu", f"{found}, bf16")
        return warn("gpu", f"{found}, no bf16", "use precision: fp16 or fp32 for teachers")
    if device.startswith("cuda"):
        advice = "set extract: device to auto or cpu, or mend the driver"
        return fail(
            "gpu", f"none that torch {torch.__version__} can use, {device} asked for", advice
        )
    if driver:
        advice = (
            f"torch {torch.__version__} does not fit the driver: install a build of torch for it"
        )
        return fail("gpu", f"driver {driver}, but torch sees no GPU", advice)
    if device == "cpu" or torch.backends.mps.is_available():
        return ok("gpu", "none asked for" if device == "cpu" else "Apple's (mps)")
    return warn("gpu", "none", "teachers run on the CPU; `sak plan` says how long that takes")


def check_tools() -> list[Check]:
    """Git and DVC on the path, and whether this is a repository of both."""
    git, dvc = shutil.which("git"), shutil.which("dvc")
    inside = any((folder / ".git").exists() for folder in (Path.cwd(), *Path.cwd().parents))
    checks = []
    if git is None:
        checks.append(warn("git", "not installed", "DVC needs it; the sak commands do not"))
    elif not inside:
        checks.append(warn("git", "no repository here", "`git init`, which DVC needs"))
    else:
        checks.append(ok("git", git))
    if dvc is None:
        advice = "activate the environment (. .venv/bin/activate); the sak commands work without"
        checks.append(warn("dvc", "not on the path", advice))
    elif not any((folder / ".dvc").is_dir() for folder in (Path.cwd(), *Path.cwd().parents)):
        checks.append(warn("dvc", "no DVC project here", "`dvc init`, for `dvc repro`"))
    else:
        checks.append(ok("dvc", dvc))
    return checks


def check_disk(path: Path, needed: int | None) -> Check:
    """Speed and room where the store is, or will be; `needed` bytes are still to be written."""
    advice = "correct its permissions, or choose another `store:`"
    if path.is_dir() and not os.access(path, os.W_OK | os.X_OK):
        return fail(
            "disk", f"{path} cannot be written by this user, or is mounted read-only", advice
        )
    try:
        disk = measure_disk(path, _TRIAL)
    except OSError as error:
        return fail("disk", f"{existing_parent(path)} cannot be written: {error.strerror}", advice)
    found = (
        f"{decimal(disk.free_bytes)} free, writes {decimal(int(disk.write_rate))}/s, "
        f"reads {decimal(int(disk.read_rate))}/s"
    )
    if needed is not None:
        found += f"; about {decimal(needed)} still to write"
        if needed and needed + RESERVE_BYTES > disk.free_bytes:  # extraction would refuse to begin
            found += f", {decimal(RESERVE_BYTES)} are kept free"
            advice = "`sak plan --budget` chooses what fits; or make room, or another `store:`"
            return fail("disk", found, advice)
    if disk.free_bytes < _GIB:
        return warn("disk", found, "make room: even a small store takes hundreds of MB")
    if disk.write_rate < _LEAST_RATE:
        return warn("disk", found, "a disk this slow will be the bottleneck; choose another")
    return ok("disk", found)


def _meminfo() -> dict[str, int]:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        return {}
    fields = (line.split() for line in lines)
    return {name.rstrip(":"): int(value) * 1024 for name, value, *_ in fields}


def _memory_limit() -> int | None:
    """Return the bytes of the control group, version 2 or 1, None without a limit."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        text = _read(CGROUP / name)
        if text.isdigit() and int(text) < _NO_LIMIT:
            return int(text)
    return None


def _cpu_quota() -> float | None:
    """Return the processors' worth of time of the control group, None without a limit."""
    quota, _, period = _read(CGROUP / "cpu.max").partition(" ")
    if not period:
        quota = _read(CGROUP / "cpu/cpu.cfs_quota_us")
        period = _read(CGROUP / "cpu/cpu.cfs_period_us")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def _driver() -> str:
    found = re.search(r"Kernel Module\D*([\d.]+)", _read(DRIVER))
    return found[1] if found else ""


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # no such thing on this system
        return ""
