"""delta_m against the rows printed in the SAK paper, and the table around it."""

import json
import math

import pytest

from stages.data.tasks import NYUD_TASKS, PASCAL_TASKS, Task
from stages.evaluate.delta import LOSS_REASON, DeltaError, compare, delta_m

SIX_TASKS = tuple({task.name: task for task in (*PASCAL_TASKS, *NYUD_TASKS)}.values())

# Tables of SAK (arXiv 2410.14633): columns with "lower is better", the single-task row, the others.
PASCAL = {
    "segmentation": False,
    "parts": False,
    "saliency": False,
    "normals": True,
    "boundary": False,
}
NYUD = {"segmentation": False, "depth": True, "normals": True, "boundary": False}
PASCAL_L = (81.61, 72.77, 83.80, 13.87, 75.24)
PASCAL_B = (80.25, 70.54, 84.54, 13.57, 74.22)
NYUD_L = (54.19, 0.5560, 19.22, 78.09)
NYUD_B = (51.15, 0.5792, 19.77, 77.35)
PRINTED = [
    (PASCAL, PASCAL_L, (79.26, 68.28, 84.16, 14.06, 71.59), -2.97),  # multi-task
    (PASCAL, PASCAL_L, (81.41, 70.52, 84.90, 13.51, 75.42), 0.16),  # MLoRE
    (PASCAL, PASCAL_L, (81.11, 71.50, 85.17, 13.49, 74.80), 0.29),  # RADIO
    (PASCAL, PASCAL_L, (84.01, 76.99, 84.65, 13.82, 76.27), 2.30),  # SAK
    (PASCAL, PASCAL_B, (76.76, 65.26, 84.39, 13.98, 70.37), -4.04),  # multi-task
    (PASCAL, PASCAL_B, (81.88, 74.30, 84.79, 14.02, 74.09), 0.83),  # SAK
    (NYUD, NYUD_L, (52.42, 0.5413, 19.29, 76.50), -0.76),  # multi-task
    (NYUD, NYUD_L, (63.18, 0.4313, 16.25, 79.43), 14.05),  # SAK
    (NYUD, NYUD_B, (49.27, 0.5823, 19.92, 75.88), -1.72),  # multi-task
    (NYUD, NYUD_B, (59.93, 0.4942, 17.60, 78.60), 11.11),  # SAK
]


def values(tasks: dict[str, bool], numbers: tuple[float, ...]) -> dict[str, float]:
    return dict(zip(tasks, numbers, strict=True))


@pytest.mark.parametrize(("tasks", "single", "multi", "printed"), PRINTED)
def test_printed_rows(
    tasks: dict[str, bool], single: tuple[float, ...], multi: tuple[float, ...], printed: float
) -> None:
    ours = delta_m(values(tasks, multi), values(tasks, single), tasks)
    assert ours == pytest.approx(printed, abs=0.015)


def test_baseline_against_itself_is_zero() -> None:
    single = values(NYUD, NYUD_L)
    assert delta_m(single, single, NYUD) == 0


def test_by_hand() -> None:
    results, single = {"a": 11.0, "b": 3.0}, {"a": 10.0, "b": 4.0}
    assert delta_m(results, single, {"a": False, "b": True}) == pytest.approx((10 + 25) / 2)


@pytest.mark.parametrize(
    ("results", "single", "message"),
    [
        ({}, {"a": 1.0}, "finite metric of task 'a' in the results, got None"),
        ({"a": 1.0}, {}, "single-task baseline, got None"),
        ({"a": math.nan}, {"a": 1.0}, "in the results, got nan"),
        ({"a": 1.0}, {"a": 0.0}, "its baseline is 0"),
    ],
)
def test_what_has_no_delta(
    results: dict[str, float], single: dict[str, float], message: str
) -> None:
    with pytest.raises(DeltaError, match=message):
        delta_m(results, single, {"a": False})


def test_no_task_has_no_delta() -> None:
    with pytest.raises(DeltaError, match="at least one task"):
        delta_m({}, {}, {})


SINGLE = {"segmentation": 50.0, "depth": 0.5, "normals": 20.0, "boundary": 0.1}
BETTER = {"segmentation": 55.0, "depth": 0.45, "normals": 19.0, "boundary": 0.9}
WORSE = {"segmentation": 45.0, "depth": 0.50, "normals": 20.0, "boundary": 0.1}


def test_table() -> None:
    table = compare(NYUD_TASKS, {"plain": WORSE, "sak": BETTER}, SINGLE)
    assert [row.run for row in table.rows] == ["single-task", "plain", "sak"]
    deltas = [row.delta_m for row in table.rows]
    assert deltas == [0, pytest.approx(-10 / 3), pytest.approx((10 + 10 + 5) / 3)]
    assert [column.metric for column in table.columns] == [task.metric for task in NYUD_TASKS]


def test_boundary_loss_is_shown_but_does_not_count() -> None:
    table = compare(NYUD_TASKS, {"sak": BETTER}, SINGLE)
    assert table.tasks_counted == ("segmentation", "depth", "normals")
    assert table.rows[1].values["boundary"] == 0.9
    assert table.as_json()["tasks_left_out"] == {"boundary": LOSS_REASON}
    assert "odsF" in LOSS_REASON


def test_boundary_counts_once_its_metric_is_the_benchmark() -> None:
    odsf = Task(name="boundary", channels=1, loss_weight=50.0, metric="odsF", lower_is_better=False)
    tasks = (*NYUD_TASKS[:3], odsf)
    assert "boundary" in compare(tasks, {"sak": BETTER}, SINGLE).tasks_counted


def test_task_without_label_or_baseline_is_left_out_for_all_runs() -> None:
    single = {"segmentation": 50.0, "normals": 20.0, "parts": math.nan}
    run = {**BETTER, "parts": math.nan, "saliency": 60.0}
    table = compare(SIX_TASKS, {"sak": run}, single)
    left_out = {column.task: column.left_out for column in table.columns}
    assert table.tasks_counted == ("segmentation", "normals")
    assert left_out["parts"] == "no labelled pixel in the evaluated split"
    assert left_out["depth"] == left_out["saliency"] == "no single-task baseline was evaluated"
    assert table.rows[1].delta_m == pytest.approx((10 + 5) / 2)


def test_run_without_a_counted_task_has_no_delta() -> None:
    run = {"segmentation": 55.0}
    table = compare(NYUD_TASKS, {"half": run}, SINGLE)
    assert table.rows[1].delta_m is None
    assert table.rows[1].values == {**run, "depth": None, "normals": None, "boundary": None}


def test_without_baselines_there_is_no_delta_and_no_row() -> None:
    table = compare(NYUD_TASKS, {"sak": BETTER}, {})
    assert [(row.run, row.delta_m) for row in table.rows] == [("sak", None)]


def test_json_has_no_nan_and_comes_back() -> None:
    table = compare(SIX_TASKS, {"sak": {**BETTER, "parts": math.nan}}, SINGLE)
    text = json.dumps(table.as_json(), allow_nan=False)
    assert json.loads(text)["runs"]["sak"]["metrics"]["parts"] is None
    assert json.loads(text)["runs"]["sak"]["delta_m"] == pytest.approx(25 / 3)


def test_unknown_task_is_refused() -> None:
    with pytest.raises(DeltaError, match=r"run 'sak' has tasks \['flow'\]"):
        compare(NYUD_TASKS, {"sak": {"flow": 1.0}}, SINGLE)


def test_run_may_not_be_called_like_the_baseline() -> None:
    with pytest.raises(DeltaError, match="rename that run"):
        compare(NYUD_TASKS, {"single-task": BETTER}, SINGLE)
