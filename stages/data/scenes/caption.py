"""Captions from the scene graph: what is visible, its looks, and where it stands."""

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from stages.data.scenes.camera import Camera
from stages.data.scenes.room import Room, Thing

VISIBLE_SHARE = 0.006
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "many")
MOST_THINGS = 4


def describe(room: Room, camera: Camera, instances: npt.NDArray[np.int32]) -> str:
    """A few short sentences about the visible things of an instance map H x W.

    Largest things come first. Left and right are the image's; behind compares distances along
    the optical axis. The vocabulary is closed: class, colour, pattern, pose and number words.
    """
    ids, counts = np.unique(instances, return_counts=True)
    area = dict(zip(ids.tolist(), (counts / instances.size).tolist(), strict=True))
    seen = [t for t in room.things if t.instance and area.get(t.instance, 0.0) >= VISIBLE_SHARE]
    seen.sort(key=lambda t: -area[t.instance])
    shown = sorted(seen[:MOST_THINGS], key=lambda t: t.model.kind != "person")
    surfaces = {t.model.kind: t for t in room.things if t.instance == 0}
    sentences = [f"a room with {_looks(surfaces['floor'])} and {_looks(surfaces['wall'])}"]
    sentences += _counts(seen)
    sentences += [_relation(a, b, camera, instances) for a, b in pairwise(shown)]
    if len(shown) == 1:
        sentences.append(f"there is {_looks(shown[0])}")
    return ". ".join(sentences) + "."


def _looks(thing: Thing) -> str:
    """An article, the pattern unless plain, the colour, the class; for people their clothes."""
    made = thing.model
    words = [made.colour] if made.pattern == "plain" else [made.pattern, made.colour]
    if made.kind == "person":
        return f"a {made.pose} person in {' '.join(words)}"
    return " ".join(["an" if words[0] == "orange" else "a", *words, made.kind])


def _counts(seen: list[Thing]) -> list[str]:
    kinds = [t.model.kind for t in seen]
    several = [k for k in dict.fromkeys(kinds) if kinds.count(k) > 1]
    parts = [f"{NUMBERS[min(kinds.count(k), 9)]} {_plural(k)}" for k in several]
    return [f"there are {' and '.join(parts)}"] if parts else []


def _plural(kind: str) -> str:
    special = {"person": "people", "shelf": "shelves", "box": "boxes"}
    return special.get(kind, kind + "s")


def _relation(first: Thing, second: Thing, camera: Camera, instances: npt.NDArray[np.int32]) -> str:
    """The clearer of beside and behind, by visible centroids and by depth of the origins."""
    columns = [float(np.nonzero(instances == t.instance)[1].mean()) for t in (first, second)]
    across = (columns[1] - columns[0]) / instances.shape[1]
    offsets = [np.asarray(t.position) - camera.position for t in (first, second)]
    depth = [float(o @ camera.axes[2]) for o in offsets]
    away = (depth[0] - depth[1]) / max(depth[1], 0.5)
    if abs(across) >= 0.5 * abs(away):
        word = "to the left of" if across > 0 else "to the right of"
    else:
        word = "behind" if away > 0 else "in front of"
    return f"{_looks(first)} is {word} {_looks(second)}"
