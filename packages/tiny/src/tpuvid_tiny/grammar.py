"""The words wan-tiny knows: what a clip can show, how a caption says it, and which combinations are held out.

Pure Python, so that the tokenizer, the renderer, the scorer and the tests share one list of words.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

COLOURS = ("red", "green", "blue", "yellow", "cyan", "magenta")
SHAPES = ("circle", "square", "triangle", "cross")
MOTIONS = ("moving left", "moving right", "moving up", "moving down", "growing", "shrinking")
BACKGROUNDS = ("black", "white", "gray")
SIZES = ("", "small", "big")  # "" is the middle size: the caption names none

# Other ways to say the same thing; a training caption uses each one now and then.
SYNONYMS = {"big": ("large",), "gray": ("grey",), "circle": ("disc",), "cross": ("plus",)}
MOTION_SYNONYMS = {
    "moving left": ("moving to the left",),
    "moving right": ("moving to the right",),
    "moving up": ("moving upwards",),
    "moving down": ("moving downwards",),
}

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"


@dataclass(frozen=True)
class Scene:
    """What one clip shows."""

    colour: str
    shape: str
    motion: str
    background: str
    size: str = ""

    @property
    def triple(self) -> tuple[str, str, str]:
        return self.colour, self.shape, self.motion

    @property
    def held_out(self) -> bool:
        """True for the quarter of the (colour, shape, motion) triples that training never sees.

        A diagonal of the cube: every pair of words is still trained together with some third word.
        """
        position = COLOURS.index(self.colour) + SHAPES.index(self.shape) + MOTIONS.index(self.motion)
        return position % 4 == 3

    def caption(self) -> str:
        """The plain sentence: ``a red circle moving right on a black background``."""
        return self.say(self.shape, self.motion, self.background, self.size)

    def say(self, shape: str, motion: str, background: str, size: str) -> str:
        size = f"{size} " if size else ""
        return f"a {size}{self.colour} {shape} {motion} on a {background} background"

    def varied_caption(self, rng: random.Random, synonym_rate: float = 0.15) -> str:
        """The sentence, with each word that has synonyms replaced by one at ``synonym_rate``."""

        def vary(word: str) -> str:
            others = SYNONYMS.get(word) or MOTION_SYNONYMS.get(word)
            return rng.choice(others) if others and rng.random() < synonym_rate else word

        return self.say(vary(self.shape), vary(self.motion), vary(self.background), vary(self.size))


def all_scenes(sizes: tuple[str, ...] = SIZES) -> Iterator[Scene]:
    """Every scene of the grammar, in a fixed order."""
    for colour, shape, motion, background, size in itertools.product(COLOURS, SHAPES, MOTIONS, BACKGROUNDS, sizes):
        yield Scene(colour, shape, motion, background, size)


def training_scenes() -> list[Scene]:
    return [scene for scene in all_scenes() if not scene.held_out]


def held_out_scenes(sizes: tuple[str, ...] = ("",)) -> list[Scene]:
    return [scene for scene in all_scenes(sizes) if scene.held_out]


def vocabulary() -> list[str]:
    """Every piece of the tokenizer, in id order: the three special ones, then all words a caption can hold."""
    spoken = ["a on background", *COLOURS, *SHAPES, *MOTIONS, *BACKGROUNDS, *SIZES]
    spoken += [other for others in (*SYNONYMS.values(), *MOTION_SYNONYMS.values()) for other in others]
    words = dict.fromkeys(" ".join(spoken).split())
    return [PAD, EOS, UNK, *words]
