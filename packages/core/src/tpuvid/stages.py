"""The values that pass between the three stages, and what a model says about itself. Imports neither jax nor torch.

A video is made by ``encode`` (prompt → `Conditioning`), ``denoise`` (→ `Latents`) and ``decode`` (→ `Video`).
Shapes use B batch, F/H/W pixel frames/height/width, f/h/w latent grid, C channels, L text tokens, E width.
"""

from __future__ import annotations

import importlib
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tpuvid.errors import InputError, TpuvidError
from tpuvid.stepcache import fill_cache_settings
from tpuvid.window_size import WindowSize

if TYPE_CHECKING:
    import numpy as np

    from tpuvid.checkpoint import Checkpoint
    from tpuvid.control import Loop
    from tpuvid.runtime import Runtime

API_VERSION = 2
"""2: `Denoiser.denoise` takes a `Loop` and makes batches."""
OPTIONAL_SETTINGS = {
    "flow_shift": "flow-matching schedule",
    "use_dynamic_cfg": "dynamic guidance",
    "cache": "step cache",
    "window_size": "attention window",
}
OPTIONAL_FEATURES = {
    "lora": "merges LoRA files",
    "fps": "denoises for a frame rate, so that its latents can't be played at another",
}
LARGEST = 1e30
"""Of what float32 has to hold."""
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
    """A step cache ("deepcache"), and its settings: see `tpuvid.stepcache`."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeRules:
    """Which sizes a model accepts. Frames are ``frame_step · n + 1``."""

    frame_step: int
    size_multiple: int
    max_frames: int
    max_size: int

    def check(self, *, height: int, width: int, num_frames: int) -> None:
        """Raise `InputError` naming the nearest valid value of the first size that breaks a rule."""
        for name, size in (("height", height), ("width", width)):
            multiple = self.size_multiple
            if not (multiple <= size <= self.max_size and size % multiple == 0):
                nearest = _nearest(size, multiple, 0, multiple, self.max_size)
                raise InputError(f"{name}={size}: needs a multiple of {multiple} up to {self.max_size}; nearest: {nearest}")
        if not (1 <= num_frames <= self.max_frames and num_frames % self.frame_step == 1 % self.frame_step):
            nearest = _nearest(num_frames, self.frame_step, 1, 1, self.max_frames)
            raise InputError(
                f"num_frames={num_frames}: needs {self.frame_step}n+1 frames up to {self.max_frames}; nearest: {nearest}"
            )


def _nearest(value: int, step: int, offset: int, low: int, high: int) -> str:
    """The valid values around `value` among ``step · n + offset`` within [low, high], for an error message."""
    below = (value - offset) // step * step + offset
    top = (high - offset) // step * step + offset
    return " and ".join(str(v) for v in sorted({min(max(v, low), top) for v in (below, below + step)}))


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


History = Mapping[str, Mapping[str, Any]]
"""By stage ("encode", "denoise", "decode"): where its weights came from, how they ran, and the seconds that each part took."""


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What the text encoder makes of a prompt.

    `tensors` holds numpy arrays under the names of the diffusers pipeline's arguments, for example
    ``prompt_embeds`` [B, L, E] and ``negative_prompt_embeds`` [B, L, E] (absent where guidance is off).
    """

    model_id: str
    prompt: str
    negative_prompt: str
    max_sequence_length: int | None
    """None where a foreign file does not say."""
    tensors: Mapping[str, np.ndarray]
    history: History = field(default_factory=dict)
    fingerprint: str | None = None
    """Of a local checkpoint: see `Checkpoint.fingerprint`."""


@dataclass(frozen=True, kw_only=True)
class Latents:
    """Denoised latents [B, C, f, h, w], float32, as the diffusion model leaves them (normalised)."""

    model_id: str
    latents: np.ndarray
    config: GenerationConfig
    history: History = field(default_factory=dict)
    fingerprint: str | None = None
    """Of a local checkpoint: see `Checkpoint.fingerprint`."""

    def check(self) -> None:
        """Raise `TpuvidError` unless every value is finite."""
        check_finite("latents", self.latents)


@dataclass(frozen=True, kw_only=True)
class Video:
    """Frames [B, F, H, W, C], float32 in [0, 1], with the settings that made them."""

    model_id: str
    frames: np.ndarray
    config: GenerationConfig
    history: History = field(default_factory=dict)

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write an H.264 mp4; raise `InputError` where `path` exists and `overwrite` is false."""
        from tpuvid.video import save_mp4

        return save_mp4(self.frames[0], path, fps=self.config.fps, overwrite=overwrite)


def check_finite(what: str, *values: np.ndarray) -> None:
    """Raise `TpuvidError` for results that hold NaN or infinity."""
    import numpy as np

    for value in values:
        if not np.isfinite(value.astype(np.float32)).all():
            raise TpuvidError(f"the {what} hold NaN or infinity; check the weights (and LoRA), or try --dtype float32")


StepCallback = Callable[[int, int], None]
"""Called after each denoising step with (steps done, steps in all); an exception raised in it stops the run."""


class Stage(Protocol):
    """One part of a model. Making it reads configs only, so that inputs are checked before any weight is loaded."""

    def verify(self) -> None:
        """Raise `InputError` unless weights and configs fit together, by names and shapes alone."""

    def load(self) -> None:
        """Put the weights on the devices."""


class TextEncoder(Stage, Protocol):
    def encode(self, config: GenerationConfig, *, negative: bool) -> Mapping[str, np.ndarray]:
        """Embed ``config.prompt``, and the negative prompt where `negative`, as `Conditioning.tensors`."""


class Denoiser(Stage, Protocol):
    def resolve(self, config: GenerationConfig) -> GenerationConfig:
        """`config` with what it leaves to the checkpoint (flow shift, guidance) filled in, so that the record says what ran."""

    def check(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Raise `InputError` if these conditioning tensors, of one prompt, do not fit this model."""

    def denoise(self, tensors: Mapping[str, np.ndarray], config: GenerationConfig, loop: Loop) -> np.ndarray:
        """Noise of ``loop.seeds`` → latents [B, C, f, h, w], float32.

        `tensors` are of B prompts, [B, …] each; of `config` all holds for each of them but prompts and seed.
        """


class Decoder(Stage, Protocol):
    def check(self, latents: np.ndarray) -> None:
        """Raise `InputError` if latents of this shape do not fit this model."""

    def decode(self, latents: np.ndarray) -> Iterator[np.ndarray]:
        """Latents [B, C, f, h, w] → chunks of frames [B, n, H, W, C], float32 in [0, 1], first to last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conformance:
    """What `tpuvid plugin check` runs a family with, on a CPU. Callables are named "module:callable", imported when called."""

    random_checkpoint: str
    """Called with a folder (Path): writes a small checkpoint of random weights into it, in the layout of the family's own."""
    settings: Mapping[str, Any]
    """Of a small video with guidance, as `ModelSpec.configure` takes them."""
    reference: str | None = None
    """Called with (folder, GenerationConfig): runs the pipeline that the family must agree with, in float32, and returns numpy
    arrays under "latents" [1, C, f, h, w], "frames" [1, F, H, W, 3] in [0, 1] and, if it likes, names of
    `Conditioning.tensors`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """One model, described without importing anything heavy."""

    model_id: str
    family: str
    pipeline_class: str
    """``_class_name`` in a checkpoint's model_index.json."""
    checkpoint: str
    """A Hub repository ("owner/name") or a folder inside a Python package ("package:folder")."""
    configs: str | None = None
    """A folder inside a Python package that holds the checkpoint's configs, for planning without a network."""
    parameters: str
    """Size of the diffusion model as published, for people: "14.3B"."""
    signature: Mapping[str, Any]
    """Values of transformer/config.json that tell this model from its siblings."""
    defaults: GenerationConfig
    rules: SizeRules
    flow_shifts: tuple[tuple[int, float], ...] = ()
    """(least pixels per frame, flow_shift), largest first; below the last, the checkpoint's own shift holds."""
    takes: tuple[str, ...] = ()
    """Of what only some models have (`OPTIONAL_SETTINGS`, `OPTIONAL_FEATURES`), what this one has."""
    components: Mapping[str, tuple[str, ...]]
    """The checkpoint's subfolders that each of the stages "encode", "denoise" and "decode" needs."""
    load_text_encoder: str
    load_denoiser: str
    load_decoder: str
    """Each "module:callable", called with (Checkpoint, Runtime) when its stage first runs; gives a `Stage`."""
    api_version: int
    """The `API_VERSION` that the package was written for, as a number: it must not follow what is installed."""
    conformance: Conformance | None = None
    """None: `tpuvid plugin check` runs the model's own checkpoint, where that is a folder inside a package."""
    twin: str | None = None
    """Of a folder or repository that is not registered: the registered model whose description it runs with."""
    decoder: str | None = None
    """The name of the `DecoderSpec` that `load_decoder` and ``components["decode"]`` have been taken from."""

    def configure(self, **settings: Any) -> GenerationConfig:
        """The model's defaults with `settings` (None: not given), checked; raises `InputError`."""
        config = self.defaults.override(**settings)
        for name, purpose in OPTIONAL_SETTINGS.items():
            if (value := getattr(config, name)) not in (None, False) and name not in self.takes:
                raise InputError(f"{name}={value}: {self.model_id} has no {purpose}; leave it out")
        if config.flow_shift is None:
            pixels = config.height * config.width
            shift = next((shift for least, shift in self.flow_shifts if pixels >= least), None)
            config = replace(config, flow_shift=shift)
        check_sampling(config)
        try:
            self.rules.check(height=config.height, width=config.width, num_frames=config.num_frames)
        except InputError as error:
            raise InputError(f"{error} ({self.model_id})") from None
        if config.window_size is not None:
            config = replace(config, window_size=str(WindowSize.parse(config.window_size)))
        return fill_cache_settings(config)

    def load(self, stage: str, checkpoint: Checkpoint, runtime: Runtime) -> Any:
        """Import and call the loader of `stage` ("text_encoder", "denoiser" or "decoder")."""
        loader = getattr(self, f"load_{stage}")
        try:
            made_by = imported(loader)
        except (ImportError, AttributeError) as error:
            raise TpuvidError(
                f"{self.model_id}: {loader} can't be imported ({error}); mend its package, or install it again"
            ) from error
        return made_by(checkpoint, runtime)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec:
    """Another decoder for registered models, which ``--decoder NAME`` puts in the place of their own."""

    name: str
    models: tuple[str, ...]
    """The ids of the models, or the families, whose latents it decodes."""
    checkpoint: str
    """As of a `ModelSpec`: where the folder `component` is."""
    component: str
    """The folder with its config.json and weights. Named unlike the components of the models."""
    load_decoder: str
    """As of a `ModelSpec`."""
    api_version: int

    def serves(self, spec: ModelSpec) -> bool:
        return bool({spec.model_id, spec.twin, spec.family} & set(self.models))


def imported(name: str) -> Any:
    """What "module:name" names."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)
