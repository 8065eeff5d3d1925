"""What decides what a video looks like, and what no model could run with. Imports neither jax nor torch."""

from __future__ import annotations

import re
import secrets
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from tpuvid.errors import InputError

OPTIONAL_SETTINGS = {
    "flow_shift": "flow-matching schedule",
    "use_dynamic_cfg": "dynamic guidance",
    "cache": "step cache",
    "window_size": "attention window",
}
LARGEST = 1e30
"""What float32 has to hold."""
MAX_SEED = 2**63 - 1  # torch.Generator.manual_seed takes an int64


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationConfig:
    """Everything that decides what a video looks like, under diffusers' argument names."""

    prompt: str = ""
    negative_prompt: str = ""
    height: int
    width: int
    num_frames: int
    fps: int
    num_inference_steps: int
    guidance_scale: float | None
    """None takes the checkpoint's own."""
    flow_shift: float | None = None
    """Timestep shift of a flow-matching schedule; None takes the checkpoint's own."""
    use_dynamic_cfg: bool = False
    """CogVideoX: guidance that changes with the timestep, as its diffusers pipeline has it."""
    seed: int = 42
    max_sequence_length: int = 512
    cache: str | None = None
    """A step cache ("deepcache"), and its settings: see `tpuvid.contract.stepcache`."""
    cache_start_step: int | None = None
    cache_end_step: int | None = None
    cache_step_interval: int | None = None
    window_size: str | None = None
    """How far a token of the video sees to either side in self-attention ("frames=16", "tokens=8192"); None: everywhere."""

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self.guidance_scale is None or self.guidance_scale > 1.0

    def override(self, **changes: Any) -> GenerationConfig:
        """A copy with every change that is not None; unknown names raise `InputError`."""
        known = {f.name for f in fields(self)}
        if unknown := sorted(set(changes) - known):
            raise InputError(f"{', '.join(unknown)}: no such setting; the settings are {', '.join(sorted(known))}")
        return replace(self, **{name: value for name, value in changes.items() if value is not None})

    def with_drawn_seed(self) -> GenerationConfig:
        """Itself, with a drawn seed in the place of −1, so that what is stored can be run again."""
        return replace(self, seed=secrets.randbelow(2**31)) if self.seed == -1 else self

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_sampling(config: GenerationConfig) -> None:
    """Raise `InputError` for a setting that no model could run with."""
    for name in ("prompt", "negative_prompt"):
        if not isinstance(getattr(config, name), str):
            raise InputError(f"{name}={getattr(config, name)!r}: needs a string; run several prompts one by one")
        if re.search("[\ud800-\udfff]", getattr(config, name)):
            raise InputError(f"{name}={getattr(config, name)[:40]!r}: holds bytes that are no UTF-8; write it in UTF-8")
    for name in ("height", "width", "num_frames", "fps", "num_inference_steps", "seed", "max_sequence_length"):
        if type(getattr(config, name)) is not int:
            raise InputError(f"{name}={getattr(config, name)!r}: needs a whole number")
    for name in ("guidance_scale", "flow_shift"):
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, (int, float, type(None))):
            raise InputError(f"{name}={value!r}: needs a number")
    if type(config.use_dynamic_cfg) is not bool:
        raise InputError(f"use_dynamic_cfg={config.use_dynamic_cfg!r}: needs true or false")
    positive = {"num_inference_steps": 1000, "fps": 240, "max_sequence_length": 4096}
    for name, most in positive.items():
        if not 1 <= getattr(config, name) <= most:
            raise InputError(f"{name}={getattr(config, name)}: needs a whole number from 1 to {most}")
    scale = config.guidance_scale
    if scale is not None and not 0 <= scale <= LARGEST:
        raise InputError(f"guidance_scale={str(scale)[:40]}: needs a finite number ≥ 0; 1.0 switches guidance off")
    shift = config.flow_shift
    if shift is not None and not 0 < shift <= LARGEST:
        raise InputError(f"flow_shift={str(shift)[:40]}: needs a finite number > 0; leave it out for the model's own")
    if not -1 <= config.seed <= MAX_SEED:
        raise InputError(f"seed={config.seed}: needs a whole number from 0 to {MAX_SEED}, or -1 to draw one")
