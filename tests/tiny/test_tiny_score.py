"""The scorer reads rendered clips right, and is not fooled by wrong ones."""

import dataclasses

import numpy as np
import pytest
from tpuvid_tiny.grammar import COLOURS, MOTIONS, SHAPES, Scene, all_scenes
from tpuvid_tiny.render import FRAMES, HEIGHT, WIDTH, render
from tpuvid_tiny.score import read_clip

RED_CIRCLE = Scene("red", "circle", "moving right", "black")


def noisy(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """A rendered clip with the noise a decoder may leave."""
    clip = render(scene, rng)
    return (clip + rng.normal(0, 0.02, clip.shape)).clip(0, 1)


def test_scorer_reads_every_triple():
    rng = np.random.default_rng(0)
    by_triple = {}
    for scene in all_scenes():
        by_triple.setdefault(scene.triple, []).append(scene)
    assert len(by_triple) == len(COLOURS) * len(SHAPES) * len(MOTIONS)
    verdicts = []
    for scenes in by_triple.values():
        scene = scenes[rng.integers(len(scenes))]
        verdicts.append(read_clip(noisy(scene, rng)).compare(scene))
    for attribute in ("colour", "shape", "motion", "background", "all"):
        assert np.mean([verdict[attribute] for verdict in verdicts]) >= 0.99


@pytest.mark.parametrize("motion, backwards", [("moving right", "moving left"), ("growing", "shrinking")])
def test_a_clip_played_backwards_moves_the_other_way(motion, backwards):
    clip = render(dataclasses.replace(RED_CIRCLE, motion=motion), np.random.default_rng(0))
    assert read_clip(clip).motion == motion
    assert read_clip(clip[::-1]).motion == backwards


def test_a_still_clip_has_no_motion():
    clip = render(RED_CIRCLE, np.random.default_rng(0))
    reading = read_clip(np.repeat(clip[8:9], FRAMES, axis=0))
    assert (reading.colour, reading.shape, reading.motion) == ("red", "circle", None)


def test_an_empty_clip_has_only_a_background():
    reading = read_clip(np.ones((FRAMES, HEIGHT, WIDTH, 3)))
    assert (reading.colour, reading.shape, reading.motion, reading.background) == (None, None, None, "white")


def test_a_bar_is_no_known_shape():
    clip = np.zeros((FRAMES, HEIGHT, WIDTH, 3))
    clip[:, 30:34, 10:50] = (0.9, 0.1, 0.1)
    assert read_clip(clip).shape is None


def test_an_object_missing_in_one_frame_is_no_object():
    clip = render(RED_CIRCLE, np.random.default_rng(0)).copy()
    clip[5] = 0
    assert read_clip(clip).colour is None


def test_an_unnamed_colour_is_none():
    clip = render(RED_CIRCLE, np.random.default_rng(0))
    brown = clip * np.array([0.5, 1.0, 1.0])
    assert read_clip(brown).colour is None
