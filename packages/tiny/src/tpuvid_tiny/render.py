"""Draw a scene: flat colour, soft edges, one clear motion. Numpy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tpuvid_tiny.grammar import Scene

FRAMES, HEIGHT, WIDTH = 17, 64, 64

COLOUR_RGB = {
    "red": (0.90, 0.10, 0.10),
    "green": (0.10, 0.75, 0.15),
    "blue": (0.15, 0.25, 0.95),
    "yellow": (0.95, 0.85, 0.10),
    "cyan": (0.10, 0.80, 0.85),
    "magenta": (0.85, 0.15, 0.80),
}
BACKGROUND_RGB = {"black": (0.0, 0.0, 0.0), "white": (1.0, 1.0, 1.0), "gray": (0.5, 0.5, 0.5)}
RADIUS = {"small": (11.0, 12.0), "": (13.5, 14.5), "big": (16.0, 17.5)}  # pixels: the range the radius is drawn from

# The edge is a logistic ramp of about this many pixels: sharp edges would cost the small VAE most of its effort.
EDGE = 0.7
TRAVEL = (20.0, 26.0)  # pixels that a moving object covers in one clip
GROWTH = (0.72, 1.32)  # radius at the small and at the large end of growing and shrinking, relative to the drawn one
DIRECTION = {"moving left": (-1, 0), "moving right": (1, 0), "moving up": (0, -1), "moving down": (0, 1)}
OFF_AXIS = 5.0  # pixels: how far from the middle an object may be, across its motion


@dataclass(frozen=True)
class Track:
    """Where the object is in each frame; arrays of F numbers, in pixels."""

    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray


def draw_track(scene: Scene, rng: np.random.Generator) -> Track:
    """The object's path: the motion is the scene's, start and speed and exact size are drawn from ``rng``."""
    time = np.linspace(-0.5, 0.5, FRAMES)
    radius = np.full(FRAMES, rng.uniform(*RADIUS[scene.size]))
    shift = rng.uniform(-OFF_AXIS, OFF_AXIS, size=2)
    if scene.motion in DIRECTION:
        direction = np.array(DIRECTION[scene.motion])
        travel = direction * rng.uniform(*TRAVEL)
        shift = np.where(direction == 0, shift, 0.4 * shift)
    else:
        travel = np.zeros(2)
        low, high = GROWTH if scene.motion == "growing" else GROWTH[::-1]
        radius = radius * np.linspace(low, high, FRAMES)
        shift = 0.6 * shift
    x = (WIDTH - 1) / 2 + shift[0] + time * travel[0]
    y = (HEIGHT - 1) / 2 + shift[1] + time * travel[1]
    return Track(x, y, radius)


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Distance to the shape's outline, negative inside; sizes are chosen so that all shapes cover a similar area."""
    if shape == "circle":
        return np.sqrt(x * x + y * y) - radius
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.90 * radius
    if shape == "triangle":  # upright; three half planes at the distance of the inscribed circle
        y = y - 0.22 * radius  # the middle of its height, not its centroid, is what moves
        slanted = abs(x) * (np.sqrt(3) / 2) - y / 2
        return np.maximum(slanted, y) - 0.70 * radius
    if shape == "cross":
        arm, half_width = 1.08 * radius, 0.40 * radius
        upright = np.maximum(abs(x) - half_width, abs(y) - arm)
        level = np.maximum(abs(x) - arm, abs(y) - half_width)
        return np.minimum(upright, level)
    raise ValueError(f"shape={shape!r} cannot be drawn")


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """One clip of the scene, float32 [F, H, W, 3] in [0, 1]."""
    track = draw_track(scene, rng)
    x = np.arange(WIDTH, dtype=np.float32)[None, None, :] - track.x[:, None, None].astype(np.float32)
    y = np.arange(HEIGHT, dtype=np.float32)[None, :, None] - track.y[:, None, None].astype(np.float32)
    distance = signed_distance(scene.shape, x, y, track.radius[:, None, None].astype(np.float32))
    cover = 1 / (1 + np.exp(np.clip(distance / EDGE, -30, 30)))[..., None]
    colour = np.array(COLOUR_RGB[scene.colour], np.float32)
    background = np.array(BACKGROUND_RGB[scene.background], np.float32)
    return (background + cover * (colour - background)).astype(np.float32)


def render_uint8(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """The same clip as uint8 [F, H, W, 3], for storing many."""
    return np.round(255 * render(scene, rng)).astype(np.uint8)
