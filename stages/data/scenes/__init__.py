"""A seeded generator of furnished rooms with people, and exact labels for six tasks."""

from stages.data.scenes.people import PARTS
from stages.data.scenes.render import CLASSES, Scene, render_scene, scene_seed
from stages.data.scenes.write import ScenesError, write_scenes

__all__ = [
    "CLASSES",
    "PARTS",
    "Scene",
    "ScenesError",
    "render_scene",
    "scene_seed",
    "write_scenes",
]
