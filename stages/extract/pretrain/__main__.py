"""Command line of the recipe: `python -m stages.extract.pretrain [NAME ...]`."""

import argparse
import logging
from pathlib import Path

from stages.extract.pretrain.config import RECIPES
from stages.extract.pretrain.run import pretrain
from stages.extract.pretrain.scenes_cache import load_scenes

_LOG = logging.getLogger(__name__)
_LOG_EVERY = 50


class _LoggedProgress:
    """Logs a line now and then."""

    def start(self, label: str, total: int) -> None:
        self._label, self._total, self._done = label, total, 0

    def advance(self, count: int = 1, note: str = "") -> None:
        self._done += count
        if self._done % _LOG_EVERY == 0 or self._done == self._total:
            _LOG.info("%s %d/%d %s", self._label, self._done, self._total, note)


def main() -> None:
    """Train the named teachers, or all three."""
    parser = argparse.ArgumentParser(prog="python -m stages.extract.pretrain", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*RECIPES, []], metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("stages/extract/weights"))
    parser.add_argument("--cache", type=Path, default=Path(".cache/pretrain.npz"))
    parser.add_argument("--scenes", type=int, default=6000, help="how many scenes to render")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    progress = _LoggedProgress()
    for name in arguments.names or RECIPES:
        config = RECIPES[name]
        scenes = load_scenes(
            arguments.cache, arguments.scenes, config.image_size, config.seed, progress
        )
        pretrain(config, scenes, arguments.out / f"{name}.safetensors", progress)


if __name__ == "__main__":
    main()
