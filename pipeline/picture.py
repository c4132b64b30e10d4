"""`sak inspect --picture`: what the stored features look like."""

from dataclasses import replace
from pathlib import Path

from pipeline.errors import StepError
from pipeline.params import load_params
from pipeline.report import Report
from stages.data.dataset import open_dataset
from stages.evaluate.feature_pictures import (
    choose_images,
    load_views,
    picture_levels,
    save_feature_sheet,
)
from store.reader import FeatureStore

_IMAGES = 4


def with_picture(
    report: Report, store: str, path: Path, ids: list[str], params: Path | None
) -> Report:
    """Save the picture of a store and say so in the report of what the store holds."""
    if path.suffix.lower() != ".png":
        raise StepError(f"--picture writes PNG, so name it .png, got {path}")
    opened = FeatureStore(store)
    shown = tuple(ids) or choose_images(opened, _IMAGES)
    pictures = picture_levels(opened, shown)
    dataset = None if params is None else open_dataset(load_params(params).data)
    views = {} if dataset is None else load_views(opened, dataset, shown)
    save_feature_sheet(pictures, shown, views, opened.views.image_size, path)
    remarks = [f"picture of {len(shown)} images, {len(pictures)} arrays: {path}"]
    if dataset is None:
        remarks.append("the picture shows no images: --params names the data they come from")
    elif absent := [name for name in shown if name not in views]:
        remarks.append(f"{params} does not list {', '.join(absent)}: drawn without the image")
    if opened.unfinished:
        remarks.append(f"not drawn, for unfinished: {', '.join(opened.unfinished)}")
    details = {"path": str(path), "images": list(shown), "with_image": list(views)}
    return replace(
        report, data={**report.data, "picture": details}, remarks=(*report.remarks, *remarks)
    )
