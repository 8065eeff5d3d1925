"""What decides what a video looks like, and what no model could run with. Imports neither jax nor torch."""

from __future__ import annotations

import math
import secrets
from dataclasses import asdict, dataclass, replace
from typing import Any

from tpuvid.contract.table import setting, table_of
from tpuvid.contract.window_size import WindowSize
from tpuvid.errors import InputError

LARGEST = 1e30
"""What float32 has to hold."""
MAX_SEED = 2**63 - 1  # torch.Generator.manual_seed takes an int64


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationConfig:
    """Everything that decides what a video looks like, under diffusers' argument names.

    All that tpuvid knows of a setting stands with its field: see `tpuvid.contract.table.Setting`.
    """

    prompt: str = setting(
        default="", flag="--prompt", help="What the video shows.", rule="needs a string; run several prompts one by one",
        enters=("encode",), per_video=True, private=True,
    )  # fmt: skip
    negative_prompt: str = setting(
        default="", flag="--negative-prompt", help="What to steer away from.",
        rule="needs a string; run several prompts one by one", enters=("encode",), per_video=True, private=True,
    )  # fmt: skip
    height: int = setting(flag="--height", help="Pixels.", enters=("denoise", "decode"), programs=True)
    width: int = setting(flag="--width", help="Pixels.", enters=("denoise", "decode"), programs=True)
    num_frames: int = setting(
        flag="--num-frames", old_names=("frames", "video_length"), enters=("denoise", "decode"), programs=True
    )
    fps: int = setting(
        flag="--fps", help="Frames per second of the mp4.", range=(1, 240), enters=("decode",), examples=(8, 24)
    )  # a model that takes "fps" denoises for it
    num_inference_steps: int = setting(
        flag=("--num-inference-steps", "--steps"), old_names=("steps",), help="Denoising steps.", range=(1, 1000),
        enters=("denoise",), calls=True,
    )  # fmt: skip
    guidance_scale: float | None = setting(
        flag="--guidance-scale", help="Classifier-free guidance; 1.0 switches it off.", range=(0, LARGEST),
        rule="needs a finite number ≥ 0; 1.0 switches guidance off", enters=("denoise",), programs=True,
    )  # fmt: skip
    """None takes the checkpoint's own."""
    flow_shift: float | None = setting(
        default=None, flag="--flow-shift", old_names=("shift",), range=(math.ulp(0.0), LARGEST),
        help="Timestep shift; default by resolution or checkpoint.",
        rule="needs a finite number > 0; leave it out for the model's own",
        enters=("denoise",), takes="flow-matching schedule", examples=(2.0, 9.0),
    )  # fmt: skip
    """Timestep shift of a flow-matching schedule; None takes the checkpoint's own."""
    use_dynamic_cfg: bool = setting(
        default=False, flag="--use-dynamic-cfg", help="CogVideoX: guidance that changes with the timestep, as in diffusers.",
        enters=("denoise",), takes="dynamic guidance", examples=(False, True),
    )  # fmt: skip
    """CogVideoX: guidance that changes with the timestep, as its diffusers pipeline has it."""
    seed: int = setting(
        default=42, flag="--seed", help="Same seed, same video; -1 draws one.", show_default=True, range=(-1, MAX_SEED),
        rule=f"needs a whole number from 0 to {MAX_SEED}, or -1 to draw one", enters=("denoise",), per_video=True,
    )  # fmt: skip
    max_sequence_length: int = setting(
        default=512, flag="--max-sequence-length", help="Text tokens; longer prompts are cut.", range=(1, 4096),
        enters=("encode", "denoise"), programs=True,
    )  # fmt: skip
    cache: str | None = setting(
        default=None, flag="--cache", metavar="NAME", enters=("denoise",), programs=True, takes="step cache",
        help="Reuse parts of one denoising step in the next ones: deepcache, or a plugin's.", examples=(None, "deepcache"),
    )  # fmt: skip
    """A step cache ("deepcache"); the settings that begin with its name are its own: see `tpuvid.contract.stepcache`."""
    cache_start_step: int | None = setting(
        default=None, flag="--cache-start-step", help="First step that may be cached. [default: 11]", range=(0, None),
        enters=("denoise",), calls=True,
    )  # fmt: skip
    cache_end_step: int | None = setting(
        default=None, flag="--cache-end-step", help="From this step on, none is cached. [default: 45]", range=(0, None),
        enters=("denoise",), calls=True,
    )  # fmt: skip
    cache_step_interval: int | None = setting(
        default=None, flag="--cache-step-interval", range=(1, None),
        help="Between them, one step in so many is full. [default: 4]", enters=("denoise",), calls=True,
    )  # fmt: skip
    window_size: str | None = setting(
        default=None, flag="--window-size", enters=("denoise",), programs=True, takes="attention window",
        reads=WindowSize.parse,
        help="In self-attention, let a token see so many frames before and after its own (16 or frames=16; tokens=8192).",
        examples=(None, "frames=1"),
    )  # fmt: skip
    """How far a token of the video sees to either side in self-attention ("frames=16", "tokens=8192"); None: everywhere."""

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self.guidance_scale is None or self.guidance_scale > 1.0

    def override(self, **changes: Any) -> GenerationConfig:
        """A copy with every change that is not None; unknown names raise `InputError`."""
        if unknown := sorted(set(changes) - set(SETTINGS)):
            raise InputError(f"{', '.join(unknown)}: no such setting; the settings are {', '.join(sorted(SETTINGS))}")
        return replace(self, **{name: value for name, value in changes.items() if value is not None})

    def with_drawn_seed(self) -> GenerationConfig:
        """Itself, with a drawn seed in the place of −1, so that what is stored can be run again."""
        return replace(self, seed=secrets.randbelow(2**31)) if self.seed == -1 else self

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def batch_key(self) -> GenerationConfig:
        """Itself without what is a video's own: alike for videos that may be denoised in one batch."""
        return replace(self, **{name: each.kind() for name, each in SETTINGS.items() if each.per_video})

    def embeddings_key(self) -> dict[str, Any]:
        """What embeddings depend on: of guidance, whether there is any, since only then is the negative prompt embedded."""
        return {name: getattr(self, name) for name in EMBEDDED} | {"guidance": self.do_classifier_free_guidance}

    def programs_key(self) -> dict[str, Any]:
        """What programs depend on, JSON-ready: of guidance, whether there is any."""
        asked = {name: getattr(self, name) for name in PROGRAM_SETTINGS if name != "guidance_scale"}
        shown = {name: "none" if value is None else value for name, value in asked.items()}
        return shown | {"guidance": "on" if self.do_classifier_free_guidance else "off"}


SETTINGS = table_of(GenerationConfig)
OPTIONAL_SETTINGS = {name: each.takes for name, each in SETTINGS.items() if each.takes}
EMBEDDED = tuple(name for name, each in SETTINGS.items() if "encode" in each.enters)
"""The settings that embeddings depend on: each is a field of `Conditioning` too."""
PRIVATE = tuple(name for name, each in SETTINGS.items() if each.private)
"""The settings that a user may want to leave out of what is kept with a video."""
PROGRAM_SETTINGS = {name: each.enters for name, each in SETTINGS.items() if each.programs}
"""The settings for whose values programs are made, with the stages whose they are."""


def check_sampling(config: GenerationConfig) -> None:
    """Raise `InputError` for a setting that no model could run with."""
    for name, each in SETTINGS.items():
        each.check(getattr(config, name))
