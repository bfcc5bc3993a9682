"""A scene as panda3d nodes: few nodes, baked light, mipmapped textures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple

import numpy as np

from relic.engine.geometry import Light, Mesh, join, mesh_of, outdoor_light, room_light
from relic.engine.materials import Material, paint
from relic.engine.scenes import OUTDOORS, Scene, Solid

__all__ = ["PANDA_AXES", "Stage", "build", "core"]

# rows: panda's x right, y forward, z up in our x right, y down, z forward
PANDA_AXES: Final = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]])

SETTINGS: Final = """
window-type none
audio-library-name null
sync-video 0
notify-level-display error
notify-level-egldisplay error
notify-level-tinydisplay error
"""
SKY_RADIUS: Final = 150.0  # m


class Stage(NamedTuple):
    """root: all nodes; rooms: one each; outdoors: what surrounds them; sky: a dome, kept round the camera."""

    root: Any
    rooms: tuple[Any, ...]
    outdoors: Any
    sky: Any

    def show(self, seen: Sequence[int]) -> None:
        """Draw only the rooms numbered `seen`, in that order: the near ones hide pixels of the far ones."""
        for number, node in enumerate(self.rooms):
            if number in seen:
                node.show()
                node.set_bin("fixed", seen.index(number))
            else:
                node.hide()
        for node in (self.outdoors, self.sky):
            node.show() if OUTDOORS in seen else node.hide()


@lru_cache(maxsize=1)
def core() -> Any:
    """Return panda3d.core, set up for rendering without a window.

    Raises:
        ImportError: If panda3d is not installed.
    """
    try:
        from panda3d import core as p3d
    except ImportError as error:
        raise ImportError(
            "the engine needs panda3d, which is not installed: pip install 'relic-world[engine]'."
        ) from error
    p3d.load_prc_file_data("relic", SETTINGS)
    return p3d


def build(scene: Scene) -> Stage:
    """Build the nodes of a scene: a node a room, so that rooms out of view cost nothing."""
    p3d = core()
    root = p3d.NodePath("scene")
    rooms = []
    for number, room in enumerate(scene.rooms):
        solids = [*(solid for thing in room.things for solid in thing.solids), *room.shell]
        rooms.append(_attach(root, f"room{number}", solids, room_light(room)))
    outdoors = _attach(root, "outdoors", scene.surroundings, outdoor_light)
    outdoors.set_bin("fixed", 100)
    sky = _sky(scene)
    sky.reparent_to(root)
    return Stage(root, tuple(rooms), outdoors, sky)


def _attach(root: Any, name: str, solids: Iterable[Solid], light: Light) -> Any:
    """Add solids to `root`, those of one look as one mesh; all plain ones share one, coloured by vertex."""
    p3d = core()
    groups: dict[Material | None, list[Mesh]] = {}
    for solid in solids:
        look = None if solid.material.pattern == "plain" else solid.material
        groups.setdefault(look, []).append(mesh_of(solid, light))
    node = p3d.GeomNode(name)
    for look, meshes in groups.items():
        state = p3d.RenderState.make_empty()
        if look is not None:
            state = state.add_attrib(p3d.TextureAttrib.make(_texture(paint(look))))
        state = state.add_attrib(p3d.ColorAttrib.make_vertex())
        node.add_geom(_geom(join(meshes)), state)
    return root.attach_new_node(node)


def _geom(mesh: Mesh) -> Any:
    """Copy a mesh into panda's buffers."""
    p3d = core()
    rows = np.zeros(len(mesh.points), dtype=[("point", "<f4", 3), ("rgba", "u1", 4), ("uv", "<f4", 2)])
    rows["point"] = mesh.points @ PANDA_AXES.T
    rows["rgba"][:, :3] = np.round(mesh.rgb * 255)
    rows["rgba"][:, 3] = 255
    rows["uv"] = mesh.uv * (1, -1)  # panda's v runs up
    data = p3d.GeomVertexData("mesh", p3d.GeomVertexFormat.get_v3c4t2(), p3d.Geom.UH_static)
    data.unclean_set_num_rows(len(rows))
    memoryview(data.modify_array(0)).cast("B")[:] = rows.tobytes()
    triangles = p3d.GeomTriangles(p3d.Geom.UH_static)
    triangles.set_index_type(p3d.Geom.NT_uint32)
    indices = triangles.modify_vertices()
    indices.unclean_set_num_rows(mesh.triangles.size)
    memoryview(indices).cast("B")[:] = mesh.triangles.astype("<u4").tobytes()
    geom = p3d.Geom(data)
    geom.add_primitive(triangles)
    return geom


def _texture(picture: np.ndarray) -> Any:
    """Make a repeating, mipmapped texture of (h, w, 3) uint8."""
    p3d = core()
    texture = p3d.Texture("pattern")
    height, width = picture.shape[:2]
    texture.setup_2d_texture(width, height, p3d.Texture.T_unsigned_byte, p3d.Texture.F_rgb)
    texture.set_ram_image_as(np.ascontiguousarray(picture[::-1]).tobytes(), "RGB")  # panda: bottom row first
    texture.set_minfilter(p3d.SamplerState.FT_linear_mipmap_linear)
    texture.set_magfilter(p3d.SamplerState.FT_linear)
    texture.set_wrap_u(p3d.SamplerState.WM_repeat)
    texture.set_wrap_v(p3d.SamplerState.WM_repeat)
    return texture


def _sky(scene: Scene) -> Any:
    """Build a dome: a gradient from horizon to zenith with soft clouds."""
    p3d = core()
    around, up = np.linspace(0, 2 * np.pi, 33), np.linspace(-np.pi / 2, np.pi / 2, 25)
    elevation, azimuth = np.meshgrid(up, around, indexing="ij")
    flat = np.cos(elevation)
    points = SKY_RADIUS * np.stack(
        [flat * np.cos(azimuth), -np.sin(elevation), flat * np.sin(azimuth)], axis=-1
    ).reshape(-1, 3)
    horizon, zenith = (np.array(colour) / 255 for colour in scene.sky)
    share = np.clip(elevation / (np.pi / 3), 0, 1)[..., None]
    rgb = horizon + (zenith - horizon) * share
    phase = (scene.seed * 31 + scene.index * 17) % 100
    cloud = np.sin(3 * azimuth + phase) * np.sin(9 * elevation + 2 * np.sin(2 * azimuth) + phase)
    cloud = np.clip(cloud, 0, 1)[..., None] * np.clip(elevation * 4, 0, 1)[..., None]
    rgb = rgb + (1 - rgb) * 0.6 * cloud
    corner = np.arange(elevation.size).reshape(elevation.shape)
    p, q, r, o = (c.ravel() for c in (corner[:-1, :-1], corner[:-1, 1:], corner[1:, 1:], corner[1:, :-1]))
    triangles = np.concatenate([np.stack([p, q, r], 1), np.stack([p, r, o], 1)])
    node = p3d.GeomNode("sky")
    uv = np.zeros((len(points), 2))
    node.add_geom(_geom(Mesh(points, rgb.reshape(-1, 3), uv, triangles)))
    sky = p3d.NodePath(node)
    sky.set_attrib(p3d.ColorAttrib.make_vertex())
    sky.set_two_sided(True)
    sky.set_bin("fixed", 101)  # last: only where nothing else is
    return sky
