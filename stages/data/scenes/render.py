"""One scene from one seed: the picture, and labels that are exact because they come from ids."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stages.data.scenes.camera import Camera, choose_camera
from stages.data.scenes.caption import describe
from stages.data.scenes.layout import furnish
from stages.data.scenes.light import draw_lighting, expose, shade
from stages.data.scenes.room import Room
from stages.data.scenes.saliency import salient_instances
from stages.data.scenes.trace import Hits, Tracer

CLASSES = (
    "floor", "wall", "ceiling", "person", "table", "chair", "sofa", "bed", "cabinet", "shelf",
    "lamp", "plant", "box", "ball", "rug", "picture",
)  # fmt: skip
IGNORE = 255
SUBPIXELS = np.array([(0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A rendered image with its labels, all H x W and of the pixel's centre.

    The camera frame is x right, y down, z forward; normals face the camera.
    """

    image: npt.NDArray[np.uint8]
    """H x W x 3 RGB, 2 x 2 supersampled."""
    segmentation: npt.NDArray[np.int64]
    """Index into `CLASSES`; 255 where a ray met nothing (does not happen in a closed room)."""
    depth: npt.NDArray[np.float32]
    """z in metres; 0 where nothing."""
    normals: npt.NDArray[np.float32]
    """H x W x 3 unit vectors; (0, 0, 0) where nothing."""
    boundary: npt.NDArray[np.float32]
    """1 where the class or instance differs from the right or the lower neighbour, else 0."""
    saliency: npt.NDArray[np.int64]
    """1 on the instances that `salient_instances` picks."""
    parts: npt.NDArray[np.int64]
    """Index into `PARTS`, above 0 exactly on people."""
    instances: npt.NDArray[np.int32]
    """0 on the room's surfaces, else one number per object or person."""
    caption: str
    """A few sentences from the scene graph about what is visible."""


def scene_seed(stream: str, seed: int, index: int) -> int:
    """The seed of one scene: of scene `index` in a named stream of a base seed.

    Streams ("train", "val", "pretrain", ...) never share scenes: the name is hashed in with the
    numbers. Teachers are pretrained on `render_scene(scene_seed("pretrain", seed, index), size)`.
    """
    words = [int.from_bytes(stream.encode(), "big"), seed, index]
    low, high = np.random.SeedSequence(words).generate_state(2, np.uint32).tolist()
    return int(low) | int(high) << 32


def render_scene(seed: int, image_size: tuple[int, int]) -> Scene:
    """Render the scene of a seed at (height, width) pixels.

    Room, things and camera depend on the seed only. Two machines with other vector units may
    differ in the last bit of a depth or a colour.
    """
    layout_rng, camera_rng, light_rng = (
        np.random.Generator(np.random.Philox(s)) for s in np.random.SeedSequence(seed).spawn(3)
    )
    room = furnish(layout_rng)
    tracer = Tracer(room.things)
    camera = choose_camera(camera_rng, room, tracer.nearest)
    image = _picture(tracer, camera, room, light_rng, image_size)
    return label_view(tracer, camera, room, image)


def _cast(
    tracer: Tracer, camera: Camera, size: tuple[int, int], offsets: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], Hits]:
    directions = camera.rays(size[0], size[1], offsets).reshape(-1, 3)
    origins = np.repeat(camera.position[None], len(directions), axis=0)
    return origins, directions, tracer.cast(origins, directions)


def _picture(
    tracer: Tracer, camera: Camera, room: Room, rng: np.random.Generator, size: tuple[int, int]
) -> npt.NDArray[np.uint8]:
    origins, directions, hits = _cast(tracer, camera, size, SUBPIXELS)
    lighting = draw_lighting(rng, room.size)
    radiance = shade(tracer, lighting, hits, origins, directions, samples=len(SUBPIXELS))
    averaged = radiance.reshape(len(SUBPIXELS), *size, 3).mean(axis=0)
    return expose(rng, averaged)


def label_view(tracer: Tracer, camera: Camera, room: Room, image: npt.NDArray[np.uint8]) -> Scene:
    """The scene that a camera sees: exact labels of pixel centres beside a given image."""
    height, width = image.shape[:2]
    _, _, hits = _cast(tracer, camera, (height, width), np.array([[0.5, 0.5]]))
    solid = hits.solid.reshape(height, width)
    known = solid >= 0
    kinds = np.array([CLASSES.index(t.model.kind) for t in room.things])
    numbers = np.array([t.instance for t in room.things], np.int32)
    thing = tracer.thing[solid]
    segmentation = np.where(known, kinds[thing], IGNORE).astype(np.int64)
    instances = np.where(known, numbers[thing], 0).astype(np.int32)
    depth = np.where(known, hits.depth.reshape(height, width), 0).astype(np.float32)
    normals = (hits.normals @ camera.axes.T).reshape(height, width, 3)
    people = {t.instance for t in room.things if t.model.kind == "person"}
    chosen = salient_instances(instances, people, _background(room))
    return Scene(
        image=image,
        segmentation=segmentation,
        depth=depth,
        normals=np.where(known[..., None], normals, 0).astype(np.float32),
        boundary=_boundary(segmentation, instances),
        saliency=np.isin(instances, chosen).astype(np.int64),
        parts=np.where(known, tracer.part[solid], 0).astype(np.int64),
        instances=instances,
        caption=describe(room, camera, instances),
    )


def _background(room: Room) -> set[int]:
    return {t.instance for t in room.things if t.model.kind in ("rug", "picture")} | {0}


def _boundary(
    segmentation: npt.NDArray[np.int64], instances: npt.NDArray[np.int32]
) -> npt.NDArray[np.float32]:
    label = segmentation * 1_000_000 + instances
    edge = np.zeros(label.shape, np.float32)
    edge[:, :-1][label[:, 1:] != label[:, :-1]] = 1
    edge[:-1][label[1:] != label[:-1]] = 1
    return edge
