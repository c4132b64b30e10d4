"""`sak gc`: what a store no longer needs."""

from rich.filesize import decimal

from pipeline.params import Params
from pipeline.report import Report
from store.collect import Garbage, collect_garbage


def collect_params(params: Params, drop: list[str], delete: bool) -> Report:
    """Collect in the parameter file's store; without `drop` the teachers it does not name go."""
    return collect(params.store, drop, delete, keep=None if drop else list(params.teachers))


def collect(store: str, drop: list[str], delete: bool, keep: list[str] | None = None) -> Report:
    """List what can go from a store, and delete it if asked to."""
    found = collect_garbage(store, drop=drop, keep=keep, delete=delete)
    freed = sum(one.bytes for one in found)
    advice = "freed" if delete else "to free with --delete"
    return Report(
        columns=("path", "what", "bytes", "state"),
        rows=tuple(
            (one.path, one.reason, decimal(one.bytes), _state(one, delete)) for one in found
        ),
        data={
            "store": str(store),
            "deleted": delete,
            "bytes": freed,
            "found": [
                {"path": str(one.path), "what": one.reason, "bytes": one.bytes, "busy": one.busy}
                for one in found
            ],
        },
        remarks=(f"{decimal(freed)} {advice}",),
    )


def _state(one: Garbage, delete: bool) -> str:
    if one.busy:
        return "in use, left alone"
    return "deleted" if delete else "to delete"
