"""Stage 2 of HunyuanVideo 1.5: noise → latents by flow matching. Source: `HunyuanVideo15Pipeline.__call__` of diffusers.

The transformer takes 2C + 1 channels: the noisy latents, the latents of a condition image and a mask of where that is;
without an image the last two are zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler
from jax import Array
from jaxtyping import Float, Int
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
    check_finite_embeds,
    load_parameters,
    make_generators,
    make_noise,
    match_parameters,
    replicated,
    step_cache,
    tabulate,
    with_negative,
)

from tpuvid_hunyuan.guidance import Guidance
from tpuvid_hunyuan.sharding import TRANSFORMER
from tpuvid_hunyuan.transformer import IMAGE_HALF, build_transformer, rotary_tables

BLOCKS = Scan(2, tokens={"hidden_states": 1, "encoder_hidden_states": 1, "freqs_cis": 0})
VAE_TIME, VAE_SPACE = 4, 16  # pixels per latent of every HunyuanVideo 1.5 VAE


def make_schedule(config: Mapping, num_inference_steps: int, flow_shift: float | None) -> Schedule:
    """The checkpoint's own scheduler, at the noise levels that the pipeline gives it; with another shift where one is given."""
    name = config.get("_class_name")
    if name != "FlowMatchEulerDiscreteScheduler":
        raise InputError(
            f"scheduler {name!r}: HunyuanVideo runs with FlowMatchEulerDiscreteScheduler; change scheduler_config.json"
        )
    changes = {} if flow_shift is None else {"shift": flow_shift}
    try:
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(config, **changes)
        return tabulate(scheduler, num_inference_steps, sigmas=np.linspace(1.0, 0.0, num_inference_steps + 1)[:-1])
    except ValueError as error:
        raise InputError(f"scheduler_config.json: {error}; change the setting") from None


def check_streams(tensors: Mapping[str, np.ndarray], text_width: int, glyph_width: int) -> None:
    """Raise `InputError` unless both text streams are there with their masks, alike for prompt and negative prompt."""
    signs = ("", "negative_") if "negative_prompt_embeds" in tensors else ("",)
    for stream, width in (("", text_width), ("_2", glyph_width)):
        names = [(f"{sign}prompt_embeds{stream}", f"{sign}prompt_embeds_mask{stream}") for sign in signs]
        if missing := next((name for pair in names for name in pair if name not in tensors), None):
            raise InputError(f"{missing} is missing; encode with this model")
        length = tensors[f"prompt_embeds{stream}"].shape[1:2]
        for name, mask_name in names:
            embeds, mask = tensors[name], tensors[mask_name]
            if embeds.shape != (1, *length, width) or 0 in embeds.shape or embeds.dtype.kind in "biu":
                raise InputError(
                    f"{name} is {embeds.dtype} {list(embeds.shape)}, this model takes [1, L, {width}], both prompts' alike; "
                    "encode with this model"
                )
            if mask.shape != (1, *length):
                raise InputError(
                    f"{mask_name} is {list(mask.shape)}, not {[1, *length]} as the embeddings are; encode with this model"
                )
            if not np.isin(mask, (0, 1)).all():
                raise InputError(f"{mask_name} holds other values than 0 and 1; encode with this model")
            check_finite_embeds(name, embeds[mask != 0])
    for sign in signs:
        if not np.any(tensors[f"{sign}prompt_embeds_mask"]):
            raise InputError(f"{sign}prompt_embeds_mask keeps no token; encode with this model")


class Inputs(NamedTuple):
    """What the transformer sees beside the latents: of the prompt, and after it in the batch of the negative prompt."""

    text: Float[Array, "B2 L E"]
    text_mask: Int[Array, "B2 L"]
    glyphs: Float[Array, "B2 G E2"]
    glyph_mask: Int[Array, "B2 G"]
    rotary: tuple[Float[Array, "T D"], Float[Array, "T D"]]


class HunyuanDenoiser:
    def __init__(self, checkpoint: Checkpoint, runtime: Runtime):
        self.scheduler_config = checkpoint.config("scheduler", "scheduler_config.json")
        self.guidance = Guidance.from_config(checkpoint.config("guider", "guider_config.json"))
        self.runtime, self.checkpoint = runtime, checkpoint
        module = build_transformer(checkpoint.config("transformer"))
        self.config, self.rope = module.config, module.rope
        self.traced = TracedModule(module, scan={"transformer_blocks": BLOCKS})
        self.mesh = runtime.denoiser_mesh(self.traced, self.config.num_attention_heads, TRANSFORMER)
        self.sampler = Sampler(self.traced, self._predict, self.mesh, runtime, guide=self.guidance.guide)

    def verify(self) -> None:
        match_parameters(self.traced, self.checkpoint.weights("transformer"), ignore=IMAGE_HALF)
        make_schedule(self.scheduler_config, 2, None)

    def load(self) -> None:
        weights, dtype = self.checkpoint.weights("transformer"), self.runtime.dtype
        self.params = load_parameters(self.traced, weights, mesh=self.mesh, rules=TRANSFORMER, dtype=dtype, ignore=IMAGE_HALF)

    def resolve(self, config: GenerationConfig) -> GenerationConfig:
        shift = self.scheduler_config.get("shift", 1.0) if config.flow_shift is None else config.flow_shift
        make_schedule(self.scheduler_config, config.num_inference_steps, shift)  # fails for steps that it can't make
        return config.override(guidance_scale=self.guidance.resolve(config.guidance_scale), flow_shift=shift)

    def check(self, tensors: Mapping[str, np.ndarray]) -> None:
        check_streams(tensors, self.config.text_embed_dim, self.config.text_embed_2_dim)

    def denoise(self, tensors: Mapping[str, np.ndarray], config: GenerationConfig, loop: Loop) -> Mapping[str, np.ndarray]:
        schedule = make_schedule(self.scheduler_config, config.num_inference_steps, config.flow_shift)
        scales = self.guidance.scales(config)
        shape = self._latent_shape(config)
        inputs = self._inputs(tensors, shape[1:], scales)
        generators = make_generators(loop.seeds)
        noise = make_noise(shape, generators)
        latents = self.sampler.sample(
            self.params, inputs, noise, schedule, scales=scales, generators=generators, cache=step_cache(config), loop=loop,
            window=self.sampler.window(config, shape[1:], video_frames=VAE_TIME),
        )  # fmt: skip
        return {"latents": latents}

    def _predict(
        self, params, latents: Float[Array, "B2 C f h w"], timesteps: Float[Array, " B2"], inputs: Inputs
    ) -> Float[Array, "B2 C f h w"]:
        """The velocity."""
        no_image = jnp.zeros((len(latents), latents.shape[1] + 1, *latents.shape[2:]), latents.dtype)
        latents = jnp.concatenate([latents, no_image], axis=1)
        return self.traced.function("forward")(params, latents, timesteps, *inputs)

    def _latent_shape(self, config: GenerationConfig) -> tuple[int, int, int, int]:
        frames = (config.num_frames - 1) // VAE_TIME + 1
        return self.config.out_channels, frames, config.height // VAE_SPACE, config.width // VAE_SPACE

    def _inputs(
        self, tensors: Mapping[str, np.ndarray], grid: tuple[int, int, int], scales: Float[np.ndarray, " steps"] | None
    ) -> Inputs:
        """The inputs for a grid of latents. Padded embeddings are set to zero: nothing in them can do harm, NaN included."""
        streams = []
        for stream in ("", "_2"):
            mask = with_negative(tensors, f"prompt_embeds_mask{stream}", scales) != 0
            embeds = np.where(mask[..., None], with_negative(tensors, f"prompt_embeds{stream}", scales), 0)
            streams += [embeds.astype(self.runtime.dtype), mask.astype(np.int32)]
        text, text_mask, glyphs, glyph_mask = self.runtime.put(streams, batch_sharded(self.mesh, len(streams[0])))
        rotary = self.runtime.put(rotary_tables(self.rope, *grid), replicated(self.mesh))
        return Inputs(text, text_mask, glyphs, glyph_mask, rotary)
