"""Stage 2 of CogVideoX: noise → latents by v-prediction. Source: `CogVideoXPipeline.__call__` of diffusers.

The transformer and the scheduler see latents as [B, f, C, h, w], the noise is drawn in that order, and f is rounded up to
whole patches; what leaves is [B, C, f, h, w] without the additional frames, which are the first ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import diffusers
import numpy as np
from diffusers import CogVideoXTransformer3DModel
from jax import Array
from jaxtyping import Float
from tpuvid.contract import GenerationConfig, Loop
from tpuvid.errors import InputError
from tpuvid.family import (
    Checkpoint,
    Runtime,
    Sampler,
    Scan,
    Schedule,
    TracedModule,
    batch_sharded,
    build,
    check_embeds,
    guidance_scales,
    load_parameters,
    make_generators,
    make_noise,
    match_parameters,
    replicated,
    step_cache,
    tabulate,
    with_negative,
)

from tpuvid_cogvideox.attention import SplitTokenAttention
from tpuvid_cogvideox.dpm import DPMSteps
from tpuvid_cogvideox.rotary import rotary_tables
from tpuvid_cogvideox.sharding import TRANSFORMER

BLOCKS = Scan(2, tokens={"hidden_states": 1, "encoder_hidden_states": 1, "image_rotary_emb": 0})
VAE_TIME, VAE_SPACE = 4, 8  # pixels per latent of every CogVideoX VAE


class Inputs(NamedTuple):
    """What the transformer sees beside the latents."""

    text: Float[Array, "B2 L E"]
    rotary: tuple[Float[Array, "T D"], Float[Array, "T D"]]


def make_schedule(config: Mapping, num_inference_steps: int) -> Schedule:
    """The checkpoint's own scheduler."""
    try:
        match config.get("_class_name"):
            case "CogVideoXDDIMScheduler":
                return tabulate(diffusers.CogVideoXDDIMScheduler.from_config(config), num_inference_steps)
            case "CogVideoXDPMScheduler":
                steps = DPMSteps(diffusers.CogVideoXDPMScheduler.from_config(config))
                return replace(tabulate(steps, num_inference_steps), draws=tuple(steps.taken))
            case name:
                raise InputError(
                    f"scheduler {name!r}: CogVideoX runs with CogVideoXDDIMScheduler or CogVideoXDPMScheduler; "
                    "change scheduler_config.json"
                )
    except ValueError as error:
        raise InputError(f"scheduler_config.json: {error}; change the setting") from None


def dynamic_scales(config: GenerationConfig, schedule: Schedule) -> Float[np.ndarray, " steps"] | None:
    """Guidance as `use_dynamic_cfg` of `CogVideoXPipeline` has it, which takes the timestep for a step's number."""
    if not config.do_classifier_free_guidance:
        return None
    steps = config.num_inference_steps
    done = (steps - schedule.timesteps.astype(np.float64)) / steps
    return (1 + config.guidance_scale * (1 - np.cos(np.pi * done**5)) / 2).astype(np.float32)


class CogVideoXDenoiser:
    rules: ClassVar = TRANSFORMER

    def build(self, config: Mapping[str, Any]) -> CogVideoXTransformer3DModel:
        """The module of transformer/config.json, without weights."""
        return build(lambda: CogVideoXTransformer3DModel.from_config(config))

    def __init__(self, checkpoint: Checkpoint, runtime: Runtime):
        self.scheduler_config = checkpoint.config("scheduler", "scheduler_config.json")
        self.runtime = runtime
        module = self.build(checkpoint.config("transformer"))
        self.config = module.config
        if not self.config.use_rotary_positional_embeddings or self.config.use_learned_positional_embeddings:
            raise InputError(
                "this transformer adds its positions (as CogVideoX-2b does); tpuvid-cogvideox runs those with rotary ones"
            )
        module.set_attn_processor(SplitTokenAttention())
        self.traced = TracedModule(module, scan={"transformer_blocks": BLOCKS})
        self.mesh = runtime.denoiser_mesh(self.traced, self.config.num_attention_heads, self.rules)
        self.checkpoint = checkpoint
        self.sampler = Sampler(self.traced, self._predict, self.mesh, runtime)

    def verify(self) -> None:
        match_parameters(self.traced, self.checkpoint.weights("transformer"))
        make_schedule(self.scheduler_config, 2)

    def load(self) -> None:
        self.params = load_parameters(
            self.traced, self.checkpoint.weights("transformer"), mesh=self.mesh, rules=self.rules, dtype=self.runtime.dtype
        )

    def resolve(self, config: GenerationConfig) -> GenerationConfig:
        make_schedule(self.scheduler_config, config.num_inference_steps)  # fails for steps that it can't make
        return config  # the checkpoint decides nothing that a setting could

    def check(self, tensors: Mapping[str, np.ndarray]) -> None:
        check_embeds(tensors, self.config.text_embed_dim)

    def denoise(self, tensors: Mapping[str, np.ndarray], config: GenerationConfig, loop: Loop) -> Mapping[str, np.ndarray]:
        schedule = make_schedule(self.scheduler_config, config.num_inference_steps)
        scales = dynamic_scales(config, schedule) if config.use_dynamic_cfg else guidance_scales(config)
        text = with_negative(tensors, "prompt_embeds", scales).astype(self.runtime.dtype)
        frames, additional = self._latent_frames(config)
        shape = (frames, self.config.in_channels, config.height // VAE_SPACE, config.width // VAE_SPACE)
        inputs = Inputs(
            text=self.runtime.put(text, batch_sharded(self.mesh, len(text))),
            rotary=self.runtime.put(rotary_tables(self.config, frames, *shape[2:]), replicated(self.mesh)),
        )
        generators = make_generators(loop.seeds)
        noise = make_noise(shape, generators)
        patch, patch_t = self.config.patch_size, self.config.patch_size_t or 1
        grid = frames // patch_t, shape[2] // patch, shape[3] // patch
        latents = self.sampler.sample(
            self.params, inputs, noise, schedule, scales=scales, generators=generators, cache=step_cache(config), loop=loop,
            window=self.sampler.window(config, grid, video_frames=VAE_TIME * patch_t),
            to_latents=lambda sample: np.moveaxis(sample[:, additional:], 1, 2),
        )  # fmt: skip
        return {"latents": latents}

    def _predict(
        self, params, latents: Float[Array, "B2 f C h w"], timesteps: Float[Array, " B2"], inputs: Inputs
    ) -> Float[Array, "B2 f C h w"]:
        forward = self.traced.function("forward", return_dict=False)
        return forward(params, latents, inputs.text, timesteps, image_rotary_emb=inputs.rotary)[0]

    def _latent_frames(self, config: GenerationConfig) -> tuple[int, int]:
        """Latent frames in whole patches, and how many of them are additional."""
        frames = (config.num_frames - 1) // VAE_TIME + 1
        additional = -frames % (self.config.patch_size_t or 1)
        return frames + additional, additional
