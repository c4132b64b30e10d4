"""Two tables of `sak plan`: what each codec keeps and costs, and how fast extraction goes."""

from dataclasses import asdict
from typing import Any

from rich.filesize import decimal

from pipeline.plan_costs import duration
from pipeline.plan_survey import Stored, Survey
from pipeline.report import Report
from store.contract import CONTRACTS
from store.sizes import row_bytes


def codec_report(survey: Survey) -> Report:
    """Tabulate every codec of every teacher, at the resolutions of the parameter file."""
    rows, data = [], {}
    for name, cost in survey.costs.items():
        asked = survey.params.teachers[name].codec
        data[name] = {codec: _stored_data(survey, name, codec) for codec in cost.codecs}
        for number, codec in enumerate(cost.codecs):
            stored = survey.stored(name, codec)
            rows.append(
                (
                    "" if number else name,
                    codec + (" (asked for)" if codec == asked else ""),
                    decimal(row_bytes(stored.record)),
                    decimal(stored.size.bytes),
                    f"{stored.ratio:.1f}x",
                    f"{stored.fidelity.cosine_mean:.5f}",
                    f"{stored.fidelity.cosine_p01:.5f}",
                    1000 * cost.codecs[codec].encode_seconds,
                    "meets" if stored.meets_contract else "misses",
                )
            )
    return Report(
        columns=("teacher", "codec", "an image", "in all", "smaller", "cosine", "1st pct",
                 "encode ms", "contract"),
        rows=tuple(rows),
        data=data,
        remarks=(*_grids(survey), *_codec_remarks(survey)),
    )  # fmt: skip


def _stored_data(survey: Survey, name: str, codec: str) -> dict[str, Any]:
    stored: Stored = survey.stored(name, codec)
    return {
        "row_bytes": row_bytes(stored.record),
        **asdict(stored.size),
        "ratio": stored.ratio,
        **asdict(stored.fidelity),
        "encode_seconds": survey.costs[name].codecs[codec].encode_seconds,
        "decode_seconds": survey.costs[name].codecs[codec].decode_seconds,
        "meets_contract": stored.meets_contract,
    }


def _grids(survey: Survey) -> list[str]:
    lines = []
    for name, cost in survey.costs.items():
        targets = [
            f"{target.level} {target.grid[0]}x{target.grid[1]}x{target.channels}"
            for target in cost.spec.targets
        ]
        lines.append(f"{name} stores {', '.join(targets)} of an image")
    return lines


def _codec_remarks(survey: Survey) -> list[str]:
    costs = survey.costs.values()
    images, tokens = min(one.images for one in costs), min(one.tokens for one in costs)
    held_out = min(one.held_out for one in costs)
    fitted = min(survey.params.extract.calibration_images, survey.rows)
    more = fitted > images
    int8, eight, sixteen = CONTRACTS
    return [
        ("cosine: mean and 1st percentile over tokens, of the worst level; codecs fitted to "
        f"{images - held_out} images, measured on {tokens} tokens or more of {held_out} others"),
        *([(f"extraction fits to {fitted} images, so that the pca codecs will lose less than here; "
           "--measure-images says how many to use now")] if more else []),
        (f"contract: cosine {int8.cosine_mean} and {int8.cosine_p01} (1st pct) up to "
        f"{int8.ratio:g}x smaller than float32, {eight.cosine_mean} and {eight.cosine_p01} up to "
        f"{eight.ratio:g}x, {sixteen.cosine_mean} beyond"),
    ]  # fmt: skip


def pace_report(survey: Survey) -> Report:
    """Tabulate how fast each step of an extraction is, and which one holds it up."""
    rows, data = [], {}
    for name, cost in survey.costs.items():
        pace, seconds = survey.pace(name), survey.seconds(name)
        steps = (pace.decode, pace.forward, pace.encode, pace.write)
        rates = map(_per_second, (*steps, pace.seconds))
        rows.append((name, *rates, pace.bottleneck, duration(seconds)))
        data[name] = {**asdict(pace), "seconds_per_image": pace.seconds, "seconds": seconds,
                      "bottleneck": pace.bottleneck, "batch_size": cost.batch_size}  # fmt: skip
    return Report(
        columns=("teacher", "decode", "forward", "encode", "write", "together", "bottleneck",
                 "time"),
        rows=tuple(rows),
        data=data,
        remarks=_pace_remarks(survey),
    )  # fmt: skip


def _pace_remarks(survey: Survey) -> tuple[str, ...]:
    shared = (
        "decoding shares the CPU with the teacher, so times add up"
        if survey.device == "cpu"
        else "decoding goes on while the teacher runs, so the slower of the two counts"
    )
    batch = max(cost.batch_size for cost in survey.costs.values())
    return (
        f"on {survey.device}: {shared}; forward, encode and write follow each other",
        (
            f"measured in batches of up to {batch} on files read just before, so a cold disk or a "
            "network may decode slower; time includes the images that codecs are fitted to"
        ),
    )


def _per_second(seconds: float | None) -> str:
    return "not measured" if seconds is None else f"{1 / max(seconds, 1e-9):,.3g}"
