"""`sak extract-teachers`: stage one, one teacher after the other."""

from dataclasses import asdict

from rich.filesize import decimal

from pipeline.errors import StepError
from pipeline.params import Params
from pipeline.report import Report
from stages.data.dataset import Dataset, open_dataset
from stages.extract.run import ExtractSummary, extract
from stages.progress import Progress
from store.errors import StoreMismatchError
from store.files import remove_tree
from store.remote import locate


def extract_teachers(params: Params, names: list[str], replace: bool, progress: Progress) -> Report:
    """Extract the named teachers, or all of them, one after the other."""
    unknown = sorted(set(names) - params.teachers.keys())
    if unknown:
        raise StepError(
            f"no teacher named {', '.join(unknown)} in the parameter file; "
            f"it has {', '.join(params.teachers)}"
        )
    dataset = open_dataset(params.data)
    return _report(
        [
            _extract_one(params, name, dataset, replace, progress)
            for name in names or list(params.teachers)
        ]
    )


def _report(results: list[ExtractSummary]) -> Report:
    rows = tuple(
        (
            one.teacher,
            one.images,
            one.already_there,
            one.quarantined,
            one.seconds,
            one.images_per_second,
            decimal(one.bytes_written),
            one.shards_written,
        )
        for one in results
    )
    return Report(
        columns=(
            "teacher", "images", "already there", "quarantined", "seconds", "images/s", "written",
            "shards",
        ),
        rows=rows,
        data={"teachers": [asdict(one) for one in results]},
        remarks=tuple(
            f"{one.teacher}, {level.level}: against fp32 on {level.tokens} tokens, cosine mean "
            f"{level.cosine_mean:.6f}, 1st percentile {level.cosine_p01:.6f}, relative L2 "
            f"{level.relative_l2:.2g}"
            for one in results
            for level in one.drift
        ),
    )  # fmt: skip


def _extract_one(
    params: Params, name: str, dataset: Dataset, replace: bool, progress: Progress
) -> ExtractSummary:
    arguments = (
        params.store, dataset.images, params.image_size, name, params.teachers[name],
        params.extract, progress,
    )  # fmt: skip
    try:
        return extract(*arguments)
    except StoreMismatchError as error:
        if not replace:
            advice = f"or drop them with: sak extract-teachers {name} --replace"
            raise StepError(f"{error}\n{advice}") from error
    remove_tree(locate(params.store) / name)
    return extract(*arguments)
