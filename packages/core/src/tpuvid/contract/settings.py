"""What decides what a video looks like, and what no model could run with. Imports neither jax nor torch."""

from __future__ import annotations

import math
import secrets
from dataclasses import asdict, dataclass, replace
from typing import Any

from tpuvid.contract.table import in_key, setting, table_of
from tpuvid.contract.window_size import WindowSize
from tpuvid.errors import InputError

LARGEST = 1e30
"""What float32 has to hold."""
MAX_SEED = 2**63 - 1  # torch.Generator.manual_seed takes an int64
ONE_PROMPT = "needs a string; run several prompts one by one"


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationConfig:
    """Everything that decides what a video looks like, under diffusers' argument names.

    All that tpuvid knows of a setting stands with its field: see `tpuvid.contract.table.Setting`.
    """

    prompt: str = setting("", help="What the video shows.", rule=ONE_PROMPT, enters=("encode",), per_video=True, private=True)
    negative_prompt: str = setting(
        "", help="What to steer away from.", rule=ONE_PROMPT, enters=("encode",), per_video=True, private=True
    )
    height: int = setting(help="Pixels.", enters=("denoise", "decode"), programs=True)
    width: int = setting(help="Pixels.", enters=("denoise", "decode"), programs=True)
    num_frames: int = setting(
        also=("--frames",), old_names=("frames", "video_length"), enters=("denoise", "decode"), programs=True
    )
    fps: int = setting(help="Frames per second of the mp4.", range=(1, 240), enters=("decode",), examples=(8, 24))
    num_inference_steps: int = setting(
        also=("--steps",), old_names=("steps",), help="Denoising steps.", range=(1, 1000), enters=("denoise",), calls=True
    )
    guidance_scale: float | None = setting(
        also=("--cfg-scale",), help="Classifier-free guidance; 1.0 switches it off.",
        range=(0, LARGEST), enters=("denoise",), programs=True,
        rule="needs a finite number ≥ 0; 1.0 switches guidance off",
    )  # fmt: skip
    """None takes the checkpoint's own."""
    flow_shift: float | None = setting(
        None, also=("--shift",), help="Timestep shift; default by resolution or checkpoint.", range=(math.ulp(0.0), LARGEST),
        rule="needs a finite number > 0; leave it out for the model's own", old_names=("shift",), enters=("denoise",),
        takes="flow-matching schedule", examples=(2.0, 9.0),
    )  # fmt: skip
    """Timestep shift of a flow-matching schedule; None takes the checkpoint's own."""
    use_dynamic_cfg: bool = setting(
        False, help="CogVideoX: guidance that changes with the timestep, as in diffusers.", enters=("denoise",),
        takes="dynamic guidance", examples=(False, True),
    )  # fmt: skip
    """CogVideoX: guidance that changes with the timestep, as its diffusers pipeline has it."""
    seed: int = setting(
        42, help="Same seed, same video; -1 draws one.", show_default=True, range=(-1, MAX_SEED), enters=("denoise",),
        rule=f"needs a whole number from 0 to {MAX_SEED}, or -1 to draw one", per_video=True,
    )  # fmt: skip
    max_sequence_length: int = setting(
        512, help="Text tokens; longer prompts are cut.", range=(1, 4096), enters=("encode", "denoise"), programs=True
    )
    cache: str | None = setting(
        None, help="Reuse parts of one denoising step in the next ones: deepcache, or a plugin's.", metavar="NAME",
        enters=("denoise",), programs=True, takes="step cache", examples=(None, "deepcache"),
    )  # fmt: skip
    """A step cache ("deepcache"); the settings that begin with its name are its own: see `tpuvid.contract.stepcache`."""
    cache_start_step: int | None = setting(
        None, help="First step that may be cached. [default: 11]", range=(0, None), enters=("denoise",), calls=True
    )
    cache_end_step: int | None = setting(
        None, help="From this step on, none is cached. [default: 45]", range=(0, None), enters=("denoise",), calls=True
    )
    cache_step_interval: int | None = setting(
        None, help="Between them, one step in so many is full. [default: 4]", range=(1, None), enters=("denoise",), calls=True
    )
    window_size: str | None = setting(
        None, help="In self-attention, let a token see so many frames before and after its own (16 or frames=16; tokens=8192).",
        reads=WindowSize.parse, enters=("denoise",), programs=True, takes="attention window", examples=(None, "frames=1"),
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
        asked = {name: in_key(getattr(self, name)) for name in PROGRAM_SETTINGS if name != "guidance_scale"}
        return asked | {"guidance": "on" if self.do_classifier_free_guidance else "off"}


SETTINGS = table_of(GenerationConfig)
OPTIONAL_SETTINGS = {name: each.takes for name, each in SETTINGS.items() if each.takes}
EMBEDDED = tuple(name for name, each in SETTINGS.items() if "encode" in each.enters)
"""The settings that embeddings depend on: each is a field of `Conditioning` too."""
PRIVATE = tuple(name for name, each in SETTINGS.items() if each.private)
"""The settings that a user may want to leave out of what is kept with a video."""
PROGRAM_SETTINGS = {name: each.enters for name, each in SETTINGS.items() if each.programs}
"""The settings for whose values programs are made, with the stages whose they are."""


def cleaned(name: str, value: Any) -> Any:
    """The value of a setting as it is meant, whichever way it came: prompts without white space around them."""
    return value.strip() if name in PRIVATE and isinstance(value, str) else value


def require_prompt(prompt: Any) -> None:
    """Raise `InputError` unless there is one."""
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError(f"prompt={prompt!r}: needs words that say what the video shows")


def check_sampling(config: GenerationConfig) -> None:
    """Raise `InputError` for a setting that no model could run with."""
    for name, each in SETTINGS.items():
        each.check(getattr(config, name))
