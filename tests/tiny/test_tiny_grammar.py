"""wan-tiny's words: what a caption says, and which combinations training never sees."""

import itertools
import random

from tpuvid_tiny import grammar
from tpuvid_tiny.grammar import COLOURS, MOTIONS, SHAPES, Scene, all_scenes, held_out_scenes, training_scenes, vocabulary


def test_the_demo_prompt_is_a_caption():
    scene = Scene("red", "circle", "moving right", "black")
    assert scene.caption() == "a red circle moving right on a black background"


def test_held_out_combinations_never_train():
    held_out = {scene.triple for scene in held_out_scenes(grammar.SIZES)}
    trained = {scene.triple for scene in training_scenes()}
    assert len(held_out) == 36
    assert len(trained) == len(COLOURS) * len(SHAPES) * len(MOTIONS) - 36
    assert not held_out & trained


def test_every_word_and_nearly_every_pair_trains():
    trained = {scene.triple for scene in training_scenes()}
    for colour, shape in itertools.product(COLOURS, SHAPES):
        assert sum(triple[:2] == (colour, shape) for triple in trained) >= 4
    for colour, motion in itertools.product(COLOURS, MOTIONS):
        assert sum((triple[0], triple[2]) == (colour, motion) for triple in trained) == 3
    said = " ".join(scene.caption() for scene in training_scenes()).split()
    for word in itertools.chain(COLOURS, SHAPES, grammar.BACKGROUNDS, ("small", "big"), " ".join(MOTIONS).split()):
        assert said.count(word) >= 100


def test_every_caption_is_in_the_vocabulary():
    rng, words = random.Random(0), set(vocabulary())
    for scene in all_scenes():
        assert set(scene.caption().split()) <= words
        assert set(scene.varied_caption(rng, synonym_rate=1.0).split()) <= words


def test_held_out_scenes_are_spread_over_the_shapes():
    shapes = [scene.shape for scene in held_out_scenes()]
    assert len(shapes) == 108
    assert all(24 <= shapes.count(shape) <= 30 for shape in SHAPES)
