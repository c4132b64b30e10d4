"""Computing a step again that a run refused because its numbers were not finite."""

from pathlib import Path

from stages.data.dataset import Dataset
from stages.train.guard import ReplayError, load_bad_step
from stages.train.identity import TrainingRun
from stages.train.run import prepare
from store.reader import FeatureStore


def replay(run: TrainingRun, dataset: Dataset, store: FeatureStore, path: Path) -> dict[str, float]:
    """Return every term of a saved step, `loss` first, and its `gradient_norm` before clipping.

    Nothing is written. The weights are those of the file, the settings those of `run`: another
    precision, say, shows whether that was the cause.

    Raises:
        ReplayError: the file holds no saved step, or one of another student.
    """
    saved = load_bad_step(path)
    learner = prepare(run, dataset, store).learner
    try:
        learner.state.student.load_state_dict(saved["weights"])
    except RuntimeError as error:
        raise ReplayError(
            f"{path} was saved by a run of another student; restore the settings of that run"
        ) from error
    return learner.recompute(saved["batch"], saved["step"], saved["rank"])
