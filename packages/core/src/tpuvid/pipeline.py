"""encode → denoise → decode over one model: each stage alone, or all in one."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import tpuvid
from tpuvid.checkpoint import Checkpoint, check_origin, resolve_model
from tpuvid.errors import InputError, TpuvidError
from tpuvid.lora import Lora
from tpuvid.mesh import MeshConfig
from tpuvid.packs import Pack, read_pack, run_key
from tpuvid.progress import Progress
from tpuvid.runtime import Runtime, enable_compilation_cache
from tpuvid.stages import Conditioning, GenerationConfig, Latents, ModelSpec, StepCallback, Video

LOADERS = {"encode": "text_encoder", "denoise": "denoiser", "decode": "decoder"}


def load(
    model: str,
    *,
    dtype: str | None = None,
    mesh: str | MeshConfig | None = None,
    attention_backend: str = "auto",
    text_encoder_device: str = "device",
    warmup_steps: int = 0,
    profile: str | Path | None = None,
    lora_path: str | Path | None = None,
    lora_scale: float = 1.0,
    vae_tiling: bool = False,
    pack: str | Path | Pack | None = None,
    trust_pack: bool = False,
    keep_loaded: bool = True,
    progress: Progress | None = None,
) -> Pipeline:
    """A pipeline for `model`; a stage's weights are loaded when it first runs.

    Args:
        model: registered id, local diffusers folder, or Hub id.
        dtype: "bfloat16" or "float32", of weights and activations; default bfloat16 on accelerators, float32 on CPU.
        mesh: "dp=2,sp=4", "dp=2,tp=4" or a `MeshConfig`; default by devices, heads and memory.
        attention_backend: "auto", "xla", "flash", "flash-smooth-k", "flash-int8" or "splash" (TPU), or "cudnn" (GPU).
        text_encoder_device: "device" (the accelerator, if there is one) or "cpu".
        warmup_steps: how often every denoising program runs before the first step that counts; the result is the same.
        profile: folder for a JAX profile of steady denoising steps, to be opened in XProf or Perfetto.
        lora_path: safetensors file of a LoRA, merged into the diffusion model with strength `lora_scale`.
        vae_tiling: decode in overlapping tiles, as diffusers' ``vae.enable_tiling()``: less device memory, another video.
        pack: file of ``tpuvid compile``, whose programs need not be compiled; what it lacks is compiled, and the history says so.
        trust_pack: the pack holds machine code; without this it is checked, and then refused.
        keep_loaded: keep every stage's weights and compiled programs for the next call. False frees each stage before the
            next one loads, for models whose stages don't fit in memory together. A text encoder on an accelerator is
            always freed before denoising.
        progress: where phases and steps are reported; default: recorded, not shown.

    Raises:
        InputError: unknown model, incomplete checkpoint, damaged pack, or options that this machine can't run.
    """
    spec, checkpoint = resolve_model(model)
    if lora_path is not None:
        lora = Lora(Path(lora_path), lora_scale)
        lora.check()
        checkpoint = replace(checkpoint, loras=(lora,))
    if isinstance(pack, str | Path):
        pack = read_pack(pack, trusted=trust_pack)
    enable_compilation_cache()
    config = MeshConfig.parse(mesh) if isinstance(mesh, str) else mesh
    runtime = Runtime.create(
        dtype=dtype,
        mesh_config=config,
        attention_backend=attention_backend,
        text_encoder_device=text_encoder_device,
        vae_tiling=vae_tiling,
        warmup_steps=warmup_steps,
        profile=profile,
        pack=pack,
        progress=progress or Progress(),
    )
    return Pipeline(spec, checkpoint, runtime, keep_loaded=keep_loaded)


class Pipeline:
    """The three stages of one model. Made by `tpuvid.load`."""

    def __init__(self, spec: ModelSpec, checkpoint: Checkpoint, runtime: Runtime, *, keep_loaded: bool = True):
        self.spec, self.checkpoint, self.runtime, self.keep_loaded = spec, checkpoint, runtime, keep_loaded
        self._opened: dict[str, Any] = {}
        self._loaded: set[str] = set()
        self._fits: set[tuple] = set()

    def generate(self, prompt: str, *, on_step: StepCallback | None = None, **settings: Any) -> Video:
        """A video of `prompt`. `settings` are the fields of `GenerationConfig`; what is not given is the model's default.

        Raises `InputError` for settings that break the model's rules, before anything is loaded.
        """
        config = self.spec.configure(prompt=prompt, **settings).with_drawn_seed()
        self.verify()
        config = self.resolve(config)
        self.check_pack(config)
        return self.decode(self.denoise_config(self.encode_config(config), config, on_step=on_step))

    def encode(self, prompt: str, negative_prompt: str = "", *, max_sequence_length: int | None = None) -> Conditioning:
        """Stage 1: embed the prompt and the negative prompt."""
        config = self.spec.configure(prompt=prompt, negative_prompt=negative_prompt, max_sequence_length=max_sequence_length)
        return self.encode_config(config, negative=True)

    def encode_config(self, config: GenerationConfig, *, negative: bool | None = None) -> Conditioning:
        """Stage 1 for a checked config; the negative prompt is embedded where guidance needs it, or as `negative` says."""
        self.check_pack(config, "encode")
        negative = config.do_classifier_free_guidance if negative is None else negative
        with self._stage("encode") as encoder:
            tensors = encoder.encode(config, negative=negative)
        _check_finite("embeddings", *tensors.values())
        return Conditioning(
            model_id=self.spec.model_id,
            prompt=config.prompt,
            negative_prompt=config.negative_prompt,
            max_sequence_length=config.max_sequence_length,
            tensors=tensors,
            history={"encode": self._record()},
            fingerprint=self.checkpoint.fingerprint(),
        )

    def denoise(self, conditioning: Conditioning, *, on_step: StepCallback | None = None, **settings: Any) -> Latents:
        """Stage 2: noise → latents. `settings` as in `generate`; raises `InputError` for another model's conditioning."""
        length = conditioning.max_sequence_length or conditioning.tensors["prompt_embeds"].shape[1]
        settings |= {
            "prompt": conditioning.prompt,
            "negative_prompt": conditioning.negative_prompt,
            "max_sequence_length": length,
        }
        return self.denoise_config(conditioning, self.spec.configure(**settings).with_drawn_seed(), on_step=on_step)

    def denoise_config(
        self, conditioning: Conditioning, config: GenerationConfig, *, on_step: StepCallback | None = None
    ) -> Latents:
        """Stage 2 for a checked config."""
        check_origin("embeddings", conditioning, self.spec, self.checkpoint)
        config = self.resolve(config)
        if config.do_classifier_free_guidance and "negative_prompt_embeds" not in conditioning.tensors:
            raise InputError(
                f"guidance_scale={config.guidance_scale} needs negative_prompt_embeds, which these embeddings lack; "
                "encode again, or pass guidance_scale=1.0"
            )
        self.check_pack(config, "denoise")
        if self.runtime.text_encoder_shares_memory:
            self._forget("encode")
        with self._stage("denoise", lambda denoiser: denoiser.check(conditioning.tensors)) as denoiser:
            latents = denoiser.denoise(conditioning.tensors, config, on_step or (lambda done, total: None))
        _check_finite("latents", latents)
        return Latents(
            model_id=self.spec.model_id,
            latents=latents,
            config=config,
            history={**conditioning.history, "denoise": self._record()},
            fingerprint=self.checkpoint.fingerprint(),
        )

    def decode(self, latents: Latents) -> Video:
        """Stage 3: latents → frames."""
        frames = np.concatenate(list(self.decode_chunks(latents)), axis=1)
        _, num_frames, height, width, _ = frames.shape  # what a foreign file says of them may be missing or wrong
        if (latents.config.num_frames - 1) // self.spec.rules.frame_step + 1 == latents.latents.shape[2]:
            num_frames = latents.config.num_frames  # as asked, also where a VAE makes a few more of as many latent frames
        config = latents.config.override(num_frames=num_frames, height=height, width=width)
        history = {**latents.history, "decode": self._record() | {"vae_tiling": self.runtime.vae_tiling}}
        return Video(model_id=self.spec.model_id, frames=frames, config=config, history=history)

    def decode_chunks(self, latents: Latents) -> Iterator[np.ndarray]:
        """Stage 3, as chunks of frames [B, n, H, W, C] in [0, 1] that come while the next ones are computed."""
        check_origin("latents", latents, self.spec, self.checkpoint)
        if not (np.issubdtype(latents.latents.dtype, np.floating) or latents.latents.dtype.name == "bfloat16"):
            raise InputError(f"latents are {latents.latents.dtype}, not floating point; denoise again")
        if 0 in latents.latents.shape or not np.isfinite(latents.latents.astype(np.float32)).all():
            raise InputError(f"latents {list(latents.latents.shape)} are empty or hold NaN or infinity; denoise again")
        self.check_pack(latents.config, "decode")
        with self._stage("decode", lambda decoder: decoder.check(latents.latents)) as decoder:
            for frames in decoder.decode(latents.latents):
                _check_finite("frames", frames)
                yield frames

    def verify(self) -> None:
        """Raise `InputError` unless all three stages are complete and their weights fit, by names and shapes: quick."""
        for components in self.spec.components.values():
            self.checkpoint.require(components)
        for name in LOADERS:
            self._open(name)

    def resolve(self, config: GenerationConfig) -> GenerationConfig:
        """`config` with what it leaves to the checkpoint filled in; raises `InputError` for what the checkpoint can't take."""
        self.runtime.check(config)
        return self._open("denoise").resolve(config)

    def check_pack(self, config: GenerationConfig, *names: str) -> None:
        """Raise `InputError` unless the pack, if there is one, is for the stages `names` (all by default) of this resolved
        config on these devices, and trusted."""
        pack, names = self.runtime.pack, names or tuple(LOADERS)
        known = (names, config.height, config.width, config.num_frames, config.max_sequence_length, config.cache,
                 config.window_size, config.do_classifier_free_guidance)  # fmt: skip
        if pack is None or known in self._fits:
            return
        pack.check(run_key(self.spec, {name: self._open(name) for name in names}, config, self.runtime))
        pack.require_trust()
        self._fits.add(known)

    def _record(self) -> dict[str, Any]:
        """What a stage keeps with its result about how it ran, JSON-ready."""
        return {
            "checkpoint": self.checkpoint.source,
            "loras": [{"path": str(lora.path), "scale": lora.scale} for lora in self.checkpoint.loras],
            "dtype": self.runtime.dtype.name,
            "tpuvid_version": tpuvid.__version__,
            **self.runtime.progress.take(),
        }

    def free(self) -> None:
        """Forget every stage's weights and compiled programs; they load again when needed."""
        for name in LOADERS:
            if name in self._loaded:
                self._forget(name)

    def _open(self, name: str) -> Any:
        """The stage `name`, made from its configs and found to fit its weights, which are not loaded yet."""
        if name not in self._opened:
            self.checkpoint.require(self.spec.components[name])
            with self.runtime.progress.phase(f"open {LOADERS[name].replace('_', ' ')}"):
                try:
                    stage = self.spec.load(LOADERS[name], self.checkpoint, self.runtime)
                    stage.verify()
                except (TpuvidError, ImportError):
                    raise
                except Exception as error:  # whatever a library makes of a config that it can't use
                    reason = " ".join(f"{type(error).__name__}: {error}".split())
                    parts = ", ".join(self.spec.components[name])
                    raise InputError(
                        f"{self.checkpoint.source}: {parts} can't be used ({reason}); download the checkpoint again"
                    ) from error
            self._opened[name] = stage
        return self._opened[name]

    @contextmanager
    def _stage(self, name: str, check: Callable[[Any], None] = lambda stage: None) -> Iterator[Any]:
        """The stage `name`, its inputs checked and then its weights loaded; freed afterwards unless `keep_loaded`."""
        stage = self._open(name)
        check(stage)
        if name not in self._loaded:
            with self.runtime.progress.phase(f"load {LOADERS[name].replace('_', ' ')}"):
                stage.load()
            self._loaded.add(name)
        try:
            yield stage
        finally:
            if not self.keep_loaded:
                self._forget(name)

    def _forget(self, name: str) -> None:
        stage = self._opened.pop(name, None)
        if name in self._loaded:
            self._loaded.discard(name)
            del stage
            gc.collect()  # a stage that refers to itself would keep its weights until Python looks for such cycles


def _check_finite(what: str, *values: np.ndarray) -> None:
    for value in values:
        if not np.isfinite(value.astype(np.float32)).all():
            raise TpuvidError(f"the {what} hold NaN or infinity; check the weights (and LoRA), or try --dtype float32")
