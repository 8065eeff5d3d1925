"""Stage 2 of HunyuanVideo 1.5: noise → latents by flow matching. Source: `HunyuanVideo15Pipeline.__call__` of diffusers.

The transformer takes 2C + 1 channels: the noisy latents, the latents of a condition image and a mask of where that is;
without an image the last two are zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler
from jax import Array
from jaxtyping import Float, Int
from tpuvid.bridge import TracedModule
from tpuvid.checkpoint import Checkpoint
from tpuvid.errors import InputError
from tpuvid.mesh import split_sizes
from tpuvid.runtime import Runtime, batch_sharded, replicated
from tpuvid.sampling import initial_state, make_generator, make_noise, run_steps
from tpuvid.schedule import Schedule, advance, tabulate
from tpuvid.stages import GenerationConfig, StepCallback
from tpuvid.weights import load_parameters, match_parameters

from tpuvid_hunyuan.guidance import Guidance
from tpuvid_hunyuan.sharding import TRANSFORMER
from tpuvid_hunyuan.transformer import IMAGE_HALF, build_transformer, rotary_tables

VAE_TIME, VAE_SPACE = 4, 16  # pixels per latent of every HunyuanVideo 1.5 VAE


class EulerSteps(FlowMatchEulerDiscreteScheduler):
    """The stock scheduler at the noise levels that the pipeline gives it."""

    def set_timesteps(self, num_inference_steps: int) -> None:
        super().set_timesteps(sigmas=np.linspace(1.0, 0.0, num_inference_steps + 1)[:-1])


def make_schedule(config: Mapping, num_inference_steps: int, flow_shift: float | None) -> Schedule:
    """The checkpoint's own scheduler, with another shift where one is given."""
    name = config.get("_class_name")
    if name != "FlowMatchEulerDiscreteScheduler":
        raise InputError(
            f"scheduler {name!r}: HunyuanVideo runs with FlowMatchEulerDiscreteScheduler; change scheduler_config.json"
        )
    changes = {} if flow_shift is None else {"shift": flow_shift}
    try:
        return tabulate(EulerSteps.from_config(config, **changes), num_inference_steps)
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
    for sign in signs:
        if not np.any(tensors[f"{sign}prompt_embeds_mask"]):
            raise InputError(f"{sign}prompt_embeds_mask keeps no token; encode with this model")


class TextStreams(NamedTuple):
    """What the transformer is told of the prompt, and below it in the batch of the negative prompt."""

    text: Float[Array, "B2 L E"]
    text_mask: Int[Array, "B2 L"]
    glyphs: Float[Array, "B2 G E2"]
    glyph_mask: Int[Array, "B2 G"]


class HunyuanDenoiser:
    def __init__(self, checkpoint: Checkpoint, runtime: Runtime):
        if checkpoint.loras:
            raise InputError(f"lora_path={checkpoint.loras[0].path}: tpuvid-hunyuan doesn't merge LoRA files; leave it out")
        self.scheduler_config = checkpoint.config("scheduler", "scheduler_config.json")
        self.guidance = Guidance.from_config(checkpoint.config("guider", "guider_config.json"))
        self.runtime, self.checkpoint = runtime, checkpoint
        module = build_transformer(checkpoint.config("transformer"))
        self.config, self.rope = module.config, module.rope
        self.traced = TracedModule(module, scan={"transformer_blocks": 2})
        widths = split_sizes(self.traced.parameters(runtime.dtype), TRANSFORMER)
        self.mesh = runtime.denoiser_mesh({self.config.num_attention_heads, *widths})
        self.programs = runtime.programs(self.mesh)

    def verify(self) -> None:
        match_parameters(self.traced, self.checkpoint.weights("transformer"), ignore=IMAGE_HALF)
        make_schedule(self.scheduler_config, 2, None)

    def load(self) -> None:
        weights, dtype = self.checkpoint.weights("transformer"), self.runtime.dtype
        self.params = load_parameters(self.traced, weights, mesh=self.mesh, rules=TRANSFORMER, dtype=dtype, ignore=IMAGE_HALF)

    def check(self, tensors: Mapping[str, np.ndarray]) -> None:
        check_streams(tensors, self.config.text_embed_dim, self.config.text_embed_2_dim)

    def denoise(
        self, tensors: Mapping[str, np.ndarray], config: GenerationConfig, on_step: StepCallback
    ) -> Float[np.ndarray, "1 C f h w"]:
        count = config.num_inference_steps
        schedule = make_schedule(self.scheduler_config, count, config.flow_shift)
        guided = self.guidance.steps(count) if config.do_classifier_free_guidance else [False] * count
        shape = self._latent_shape(config)
        rotary = jax.device_put(rotary_tables(self.rope, *shape[2:]), replicated(self.mesh))
        state = initial_state(make_noise(shape, make_generator(config.seed)), schedule)
        state = jax.device_put(state, replicated(self.mesh))
        scale = np.float32(config.guidance_scale)

        streams, compiled = {}, {}
        for kind in set(guided):
            streams[kind] = self._streams(tensors, guided=kind)
            example = (self.params, state, streams[kind], rotary, schedule.timesteps[0], schedule.weights[0], scale)
            compiled[kind] = self.programs.get("denoiser", self._function(kind), *example, donate=(1,))
        kinds = iter(guided)

        def step(state, timestep, weights):
            kind = next(kinds)
            return compiled[kind](self.params, state, streams[kind], rotary, timestep, weights, scale)

        return run_steps(step, state, schedule, self.runtime.progress, on_step)

    def _latent_shape(self, config: GenerationConfig) -> tuple[int, int, int, int, int]:
        frames = (config.num_frames - 1) // VAE_TIME + 1
        return 1, self.config.out_channels, frames, config.height // VAE_SPACE, config.width // VAE_SPACE

    def _streams(self, tensors: Mapping[str, np.ndarray], *, guided: bool) -> TextStreams:
        """Both text streams on the mesh. Padding is set to zero, so that nothing in it can do harm, NaN included."""
        signs = ("", "negative_") if guided else ("",)
        arrays = []
        for stream in ("", "_2"):
            mask = np.concatenate([tensors[f"{sign}prompt_embeds_mask{stream}"] for sign in signs]) != 0
            embeds = np.concatenate([tensors[f"{sign}prompt_embeds{stream}"] for sign in signs])
            embeds = np.where(mask[..., None], embeds, 0).astype(self.runtime.dtype)
            arrays += [embeds, mask.astype(np.int32)]
        return TextStreams(*jax.device_put(arrays, batch_sharded(self.mesh, len(signs))))

    def _predict(
        self, params, latents: Float[Array, "B C f h w"], streams: TextStreams, rotary, timestep: Float[Array, ""]
    ) -> Float[Array, "B2 C f h w"]:
        """The velocity for the prompt, and for the negative prompt where `streams` hold one."""
        batch = len(streams.text)
        latents = jnp.broadcast_to(latents, (batch, *latents.shape[1:])).astype(self.runtime.dtype)
        no_image = jnp.zeros((batch, latents.shape[1] + 1, *latents.shape[2:]), latents.dtype)
        latents = jnp.concatenate([latents, no_image], axis=1)
        latents = jax.lax.with_sharding_constraint(latents, batch_sharded(self.mesh, batch))
        timesteps = jnp.broadcast_to(timestep, batch)
        return self.traced.function("forward")(params, latents, timesteps, *streams, rotary).astype(jnp.float32)

    def _function(self, guided: bool):
        def step(
            params,
            state: Float[Array, "K B C f h w"],
            streams: TextStreams,
            rotary: tuple[Float[Array, "T D"], Float[Array, "T D"]],
            timestep: Float[Array, ""],
            weights: Float[Array, "K K1"],
            scale: Float[Array, ""],
        ) -> Float[Array, "K B C f h w"]:
            velocity = self._predict(params, state[0], streams, rotary, timestep)
            if guided:
                velocity = self.guidance.guide(velocity, scale)
            return advance(weights, state, velocity)

        return step
