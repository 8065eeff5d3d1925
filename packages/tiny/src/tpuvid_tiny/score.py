"""Read colour, shape, motion and background back from a clip's pixels. Numpy only.

No network judges another here: the background is the border's colour, the object is what differs from it, the colour
is the object's, the motion is how its middle and its area change, the shape is the nearest drawn silhouette.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tpuvid_tiny.grammar import MOTIONS, SHAPES, Scene
from tpuvid_tiny.render import BACKGROUND_RGB, COLOUR_RGB, signed_distance

# Distances between colours, in RGB's unit cube. Blue and cyan, the nearest two, are 0.56 apart.
OBJECT_CONTRAST = 0.25  # a pixel this far from the background belongs to the object
COLOUR_TOLERANCE = 0.35  # farther than this from every named colour is no colour
LEAST_PIXELS = 30  # fewer are no object
LEAST_SHIFT = 8.0  # pixels: the least travel that counts as moving; training clips move by 20 and more
LEAST_GROWTH = 1.25  # the least ratio of sizes that counts as growing; training clips reach 1.83
SILHOUETTE = 32  # side of the grid on which shapes are compared
LEAST_OVERLAP = 0.70  # intersection over union with the best silhouette below which the object is no known shape


@dataclass(frozen=True)
class Reading:
    """What a clip shows; ``None`` where nothing the grammar knows is seen."""

    colour: str | None
    shape: str | None
    motion: str | None
    background: str | None

    def compare(self, scene: Scene) -> dict[str, bool]:
        """Which attributes of ``scene`` the clip shows; ``all`` is colour, shape and motion together."""
        names = ("colour", "shape", "motion", "background")
        right = {name: getattr(self, name) == getattr(scene, name) for name in names}
        right["all"] = right["colour"] and right["shape"] and right["motion"]
        return right


def nearest(rgb: np.ndarray, palette: dict[str, tuple[float, float, float]]) -> str | None:
    """The palette's name for a colour, or None if it is near none of them."""
    distance = {name: float(np.linalg.norm(rgb - np.array(value))) for name, value in palette.items()}
    name = min(distance, key=distance.__getitem__)
    return name if distance[name] <= COLOUR_TOLERANCE else None


def border(clip: np.ndarray) -> np.ndarray:
    """The pixels [P, 3] of the outermost two rows and columns of all frames."""
    edges = (clip[:, :2], clip[:, -2:], clip[:, :, :2], clip[:, :, -2:])
    return np.concatenate([edge.reshape(-1, 3) for edge in edges])


def object_masks(clip: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Bool [F, H, W]: where the clip is not background."""
    return np.linalg.norm(clip - background, axis=-1) > OBJECT_CONTRAST


def motion_of(masks: np.ndarray) -> str | None:
    """The motion, from the mean middle and size of the object in the first and in the last quarter of the clip."""
    quarter = max(1, len(masks) // 4)
    first = np.array([middle_and_size(mask) for mask in masks[:quarter]]).mean(axis=0)
    last = np.array([middle_and_size(mask) for mask in masks[-quarter:]]).mean(axis=0)
    (dx, dy), growth = last[:2] - first[:2], last[2] / first[2]
    # Travel and growth as multiples of the least that counts: the stronger one names the motion.
    strength = {
        "moving left": -dx / LEAST_SHIFT,
        "moving right": dx / LEAST_SHIFT,
        "moving up": -dy / LEAST_SHIFT,
        "moving down": dy / LEAST_SHIFT,
        "growing": np.log(growth) / np.log(LEAST_GROWTH),
        "shrinking": -np.log(growth) / np.log(LEAST_GROWTH),
    }
    motion = max(MOTIONS, key=strength.__getitem__)
    return motion if strength[motion] >= 1 else None


def middle_and_size(mask: np.ndarray) -> tuple[float, float, float]:
    """x and y of the middle of the mask's bounding box, and the root of its area, in pixels."""
    y, x = np.nonzero(mask)
    return (x.min() + x.max()) / 2, (y.min() + y.max()) / 2, len(x) ** 0.5


def silhouette(mask: np.ndarray) -> np.ndarray:
    """The object within its bounding box, on a square grid; bool [SILHOUETTE, SILHOUETTE]."""
    y, x = np.nonzero(mask)
    side = max(np.ptp(x), np.ptp(y)) + 1
    steps = (np.arange(SILHOUETTE) + 0.5) / SILHOUETTE * side - 0.5
    rows = np.round((y.min() + y.max()) / 2 - (side - 1) / 2 + steps).astype(int)
    columns = np.round((x.min() + x.max()) / 2 - (side - 1) / 2 + steps).astype(int)
    inside = (rows >= 0) & (rows < mask.shape[0])
    beside = (columns >= 0) & (columns < mask.shape[1])
    grid = mask[rows.clip(0, mask.shape[0] - 1)][:, columns.clip(0, mask.shape[1] - 1)]
    return grid & inside[:, None] & beside[None, :]


def drawn_silhouettes() -> dict[str, np.ndarray]:
    """Each shape's silhouette as the renderer draws it, large."""
    axis = np.arange(128) - 63.5
    x, y = np.meshgrid(axis, axis)
    return {shape: silhouette(signed_distance(shape, x, y, np.array(36.0)) < 0) for shape in SHAPES}


TEMPLATES = drawn_silhouettes()


def shape_of(masks: np.ndarray) -> str | None:
    """The shape that overlaps best, over all frames in which the whole object is in view."""
    votes = []
    for mask in masks:
        touches = mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any()
        if touches:
            continue
        seen = silhouette(mask)
        votes.append([(seen & other).sum() / (seen | other).sum() for other in TEMPLATES.values()])
    if not votes:
        return None
    overlap = np.mean(votes, axis=0)
    best = int(overlap.argmax())
    return SHAPES[best] if overlap[best] >= LEAST_OVERLAP else None


def read_clip(clip: np.ndarray) -> Reading:
    """Read one clip, float [F, H, W, 3] in [0, 1]."""
    backdrop = np.median(border(clip), axis=0)
    background = nearest(backdrop, BACKGROUND_RGB)
    masks = object_masks(clip, backdrop)
    if (masks.sum(axis=(1, 2)) < LEAST_PIXELS).any():
        return Reading(None, None, None, background)
    colour = nearest(np.median(clip[masks], axis=0), COLOUR_RGB)
    return Reading(colour, shape_of(masks), motion_of(masks), background)
