import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stages.data.scenes import (
    CLASSES,
    PARTS,
    Scene,
    ScenesError,
    render_scene,
    scene_seed,
    write_scenes,
)
from stages.data.scenes.camera import Camera, choose_camera
from stages.data.scenes.furniture import model
from stages.data.scenes.layout import furnish
from stages.data.scenes.materials import plain
from stages.data.scenes.people import POSES, build_person
from stages.data.scenes.render import label_view
from stages.data.scenes.room import Room, add_shell
from stages.data.scenes.saliency import salient_instances
from stages.data.scenes.shapes import align_matrix, capsule, ellipsoid
from stages.data.scenes.trace import Tracer
from stages.progress import NoProgress

SIZE = (48, 64)
SEEDS = [scene_seed("test", 0, i) for i in range(12)]


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [render_scene(seed, SIZE) for seed in SEEDS]


def same(a: Scene, b: Scene) -> bool:
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(Scene))


def test_same_seed_same_scene_whatever_came_between(scenes: list[Scene]) -> None:
    assert same(render_scene(SEEDS[3], SIZE), scenes[3])
    assert not any(same(scenes[0], other) for other in scenes[1:])


def test_streams_share_no_seed() -> None:
    streams = ("train", "val", "pretrain")
    seeds = {scene_seed(s, base, i) for s in streams for base in (0, 1) for i in range(500)}
    assert len(seeds) == 3000


def test_shapes_dtypes_and_ranges(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert scene.image.shape == (*SIZE, 3)
        assert scene.image.dtype == np.uint8
        assert 20 < scene.image.mean() < 235
        assert set(np.unique(scene.segmentation)) <= set(range(len(CLASSES)))
        assert set(np.unique(scene.parts)) <= set(range(len(PARTS)))
        assert scene.depth.dtype == np.float32
        assert scene.depth.min() > 0.1
        assert scene.depth.max() < 12


def test_normals_are_unit_and_face_the_camera() -> None:
    for seed in range(6):
        rng = np.random.default_rng(seed)
        room = furnish(rng)
        tracer = Tracer(room.things)
        camera = choose_camera(rng, room, tracer.nearest)
        scene = label_view(tracer, camera, room, np.zeros((*SIZE, 3), np.uint8))
        np.testing.assert_allclose(np.linalg.norm(scene.normals, axis=-1), 1, atol=1e-4)
        rays = camera.rays(*SIZE, np.array([[0.5, 0.5]]))[0] @ camera.axes.T
        np.testing.assert_allclose(rays[..., 2], 1, atol=1e-5)
        assert np.all(np.sum(scene.normals * rays, axis=-1) < 1e-5)


def test_parts_exactly_on_people(scenes: list[Scene]) -> None:
    person = CLASSES.index("person")
    assert any((s.segmentation == person).any() for s in scenes)
    for scene in scenes:
        np.testing.assert_array_equal(scene.parts > 0, scene.segmentation == person)


def test_one_class_per_instance_and_room_is_instance_zero(scenes: list[Scene]) -> None:
    surfaces = [CLASSES.index(c) for c in ("floor", "wall", "ceiling")]
    for scene in scenes:
        np.testing.assert_array_equal(scene.instances == 0, np.isin(scene.segmentation, surfaces))
        for number in np.unique(scene.instances[scene.instances > 0]):
            assert len(np.unique(scene.segmentation[scene.instances == number])) == 1


def test_boundary_is_where_ids_change(scenes: list[Scene]) -> None:
    for scene in scenes:
        for row in range(SIZE[0] - 1):
            for column in range(0, SIZE[1] - 1, 5):
                here = (scene.segmentation[row, column], scene.instances[row, column])
                near = [(row, column + 1), (row + 1, column)]
                change = any((scene.segmentation[p], scene.instances[p]) != here for p in near)
                assert bool(scene.boundary[row, column]) == change


def test_saliency_covers_whole_instances_and_people(scenes: list[Scene]) -> None:
    share = [s.saliency.mean() for s in scenes]
    assert np.mean(np.array(share) > 0) > 0.8
    assert max(share) < 0.9
    for scene in scenes:
        for number in np.unique(scene.instances):
            values = np.unique(scene.saliency[scene.instances == number])
            assert len(values) == 1
            assert number > 0 or values[0] == 0


def test_saliency_rule_on_a_drawn_map() -> None:
    drawn = np.zeros((100, 100), np.int32)
    drawn[40:60, 40:60] = 1  # central and large
    drawn[0:8, 0:14] = 2  # a corner
    drawn[90:99, 90:97] = 3  # a person in a corner, 0.6 %
    drawn[0:50, 80:100] = 4  # a picture
    assert salient_instances(drawn, people={3}, background={0, 4}) == [1, 3]


def test_most_classes_and_all_poses_occur() -> None:
    rooms = [furnish(np.random.default_rng(i)) for i in range(60)]
    kinds = {t.model.kind for room in rooms for t in room.things}
    poses = {t.model.pose for room in rooms for t in room.things} - {""}
    assert kinds == set(CLASSES)
    assert poses == set(POSES)


def test_furniture_stands_inside_the_room_and_apart() -> None:
    for seed in range(30):
        room = furnish(np.random.default_rng(seed))
        for index, (x0, y0, x1, y1) in enumerate(room.taken):
            assert min(x0, y0) >= 0
            assert x1 <= room.size[0]
            assert y1 <= room.size[1]
            for a, b, c, d in room.taken[index + 1 :]:
                assert x0 >= c or a >= x1 or y0 >= d or b >= y1


@pytest.mark.parametrize("pose", ["standing", "walking", "waving"])
def test_people_stand_on_the_floor_with_all_parts(pose: str) -> None:
    for seed in range(5):
        person = build_person(np.random.default_rng(seed), pose)
        vertices = np.concatenate([s.vertices for s in person.solids])
        assert abs(vertices[:, 2].min()) < 1e-5
        assert 1.2 < vertices[:, 2].max() < 2.6
        assert {s.part for s in person.solids} == set(range(1, 7))


def looking(pitch: float) -> Camera:
    """A camera at (2, 0.5, 1.4) that looks along +y, tilted down by `pitch` radians."""
    c, s = np.cos(pitch), np.sin(pitch)
    axes = np.array([[1, 0, 0], [0, -s, -c], [0, c, -s]], np.float32)
    return Camera(position=np.array([2, 0.5, 1.4], np.float32), axes=axes, focal=0.8)


def bare_room() -> Room:
    room = Room(size=(4.0, 5.0, 2.5))
    add_shell(room, np.random.default_rng(0))
    return room


def test_depth_and_normals_are_true_on_a_known_room() -> None:
    room, camera, (height, width) = bare_room(), looking(0.35), (60, 80)
    blank = np.zeros((height, width, 3), np.uint8)
    scene = label_view(Tracer(room.things), camera, room, blank)
    rows, columns = np.indices((height, width)) + 0.5
    focal = camera.focal * width
    x = (columns - width / 2) / focal * scene.depth
    y = (rows - height / 2) / focal * scene.depth
    world = np.stack([x, y, scene.depth], -1) @ camera.axes + camera.position
    floor = scene.segmentation == CLASSES.index("floor")
    wall = scene.segmentation == CLASSES.index("wall")
    assert floor.mean() > 0.2
    np.testing.assert_allclose(world[floor][:, 2], 0, atol=1e-4)
    expected = np.broadcast_to([0, -np.cos(0.35), -np.sin(0.35)], scene.normals[floor].shape)
    np.testing.assert_allclose(scene.normals[floor], expected, atol=1e-5)
    sides = np.minimum.reduce([abs(world[..., 0]), abs(world[..., 0] - 4), abs(world[..., 1] - 5)])
    np.testing.assert_allclose(sides[wall], 0, atol=1e-4)


def test_depth_and_normals_are_true_on_a_ball() -> None:
    room, camera = bare_room(), looking(0.0)
    white = plain((1.0, 1.0, 1.0))
    center, radius = np.array([2.0, 3.0, 1.4]), 0.5
    ball = model("ball", white, [ellipsoid((0, 0, 0), (radius,) * 3, white)], (radius, radius))
    x, y, z = center.tolist()
    room.add(ball, x, y, 0.7, z)
    scene = label_view(Tracer(room.things), camera, room, np.zeros((61, 81, 3), np.uint8))
    assert scene.segmentation[30, 40] == CLASSES.index("ball")
    assert scene.depth[30, 40] == pytest.approx(2.0, abs=0.02)  # 2.5 m less the radius
    np.testing.assert_allclose(scene.normals[30, 40], [0, 0, -1], atol=0.06)
    right = scene.normals[30, np.flatnonzero(scene.instances[30] > 0)[-1]]
    assert right[0] > 0.7


def test_capsule_skin_is_at_its_radius() -> None:
    start, end = np.array([0.1, 0.2, 0.3]), np.array([0.5, -0.2, 0.9])
    solid = capsule(start, end, 0.1, plain((1.0, 1.0, 1.0)))
    along = np.clip((solid.vertices - start) @ (end - start) / np.sum((end - start) ** 2), 0, 1)
    nearest = start + along[:, None] * (end - start)
    np.testing.assert_allclose(np.linalg.norm(solid.vertices - nearest, axis=1), 0.1, atol=1e-5)


@pytest.mark.parametrize("direction", [(0, 0, 1), (0, 0, -1), (1, 0, 0), (0.3, -0.5, -0.2)])
def test_align_matrix_is_a_rotation_onto_the_direction(
    direction: tuple[float, float, float],
) -> None:
    matrix = align_matrix(direction)
    unit = np.asarray(direction) / np.linalg.norm(direction)
    np.testing.assert_allclose(matrix @ [0, 0, 1], unit, atol=1e-12)
    np.testing.assert_allclose(matrix.T @ matrix, np.eye(3), atol=1e-12)
    assert np.linalg.det(matrix) == pytest.approx(1)


def test_caption_speaks_of_what_is_seen(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert scene.caption.startswith("a room with a")
        for index, name in enumerate(CLASSES):
            if f" {name} is " in scene.caption:
                assert (scene.segmentation == index).any()
    assert len({s.caption for s in scenes}) == len(scenes)
    assert any("person in" in s.caption for s in scenes)


def test_write_scenes_layout_and_recipe(tmp_path: Path) -> None:
    root = tmp_path / "deep" / "scenes"
    write_scenes(root, 2, 1, 5, (24, 32), NoProgress())
    ids = ["train_00000", "train_00001"]
    assert (root / "gt_sets" / "train.txt").read_text().split() == ids
    assert (root / "gt_sets" / "val.txt").read_text().split() == ["val_00000"]
    scene = render_scene(scene_seed("train", 5, 1), (24, 32))

    def pixels(folder: str) -> np.ndarray:
        return np.asarray(Image.open(root / folder / "train_00001.png"))

    np.testing.assert_array_equal(pixels("images"), scene.image)
    np.testing.assert_array_equal(pixels("segmentation"), scene.segmentation + 1)
    np.testing.assert_array_equal(pixels("edge"), scene.boundary * 255)
    np.testing.assert_array_equal(pixels("saliency"), scene.saliency * 255)
    np.testing.assert_array_equal(pixels("parts"), scene.parts)
    np.testing.assert_allclose(pixels("normals") / 127.5 - 1, scene.normals, atol=0.005)
    np.testing.assert_array_equal(np.load(root / "depth" / "train_00001.npy"), scene.depth)
    assert json.loads((root / "recipe.json").read_text())["seed"] == 5
    assert [p.name for p in root.parent.iterdir()] == ["scenes"]

    before = (root / "recipe.json").stat().st_mtime_ns
    write_scenes(root, 2, 1, 5, (24, 32), NoProgress())
    assert (root / "recipe.json").stat().st_mtime_ns == before
    with pytest.raises(ScenesError, match=r"seed: has 5, asked 6"):
        write_scenes(root, 2, 1, 6, (24, 32), NoProgress())


def test_write_scenes_refuses_a_folder_of_other_files(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ScenesError, match="not a folder of rendered scenes"):
        write_scenes(tmp_path, 1, 1, 0, (24, 32), NoProgress())
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    class Impatient(NoProgress):
        def advance(self, count: int = 1, note: str = "") -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_scenes(tmp_path / "scenes", 6, 2, 0, (24, 32), Impatient())
    assert list(tmp_path.iterdir()) == []
