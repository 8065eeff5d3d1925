"""Stage 2 of CogVideoX: noise → latents by v-prediction. Source: `CogVideoXPipeline.__call__` of diffusers.

The transformer and the scheduler see latents as [B, f, C, h, w], the noise is drawn in that order, and f is rounded up to
whole patches; what leaves is [B, C, f, h, w] without the additional frames, which are the first ones.
"""

from __future__ import annotations

from collections.abc import Mapping

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
from diffusers import CogVideoXTransformer3DModel
from jax import Array
from jaxtyping import Float
from tpuvid.bridge import TracedModule, build
from tpuvid.checkpoint import Checkpoint
from tpuvid.errors import InputError
from tpuvid.mesh import split_sizes
from tpuvid.runtime import Runtime, batch_sharded, replicated
from tpuvid.sampling import check_embeds, guide, initial_state, make_generator, make_noise, run_steps
from tpuvid.schedule import Schedule, advance, tabulate
from tpuvid.stages import GenerationConfig, StepCallback
from tpuvid.weights import load_parameters, match_parameters

from tpuvid_cogvideox.dpm import DRAWS, DPMSteps
from tpuvid_cogvideox.rotary import rotary_tables
from tpuvid_cogvideox.sharding import TRANSFORMER

VAE_TIME, VAE_SPACE = 4, 8  # pixels per latent of every CogVideoX VAE


def make_schedule(config: Mapping, num_inference_steps: int) -> tuple[Schedule, list[int]]:
    """The checkpoint's own scheduler, and how many normal tensors each step draws: the first memories of its table."""
    try:
        match config.get("_class_name"):
            case "CogVideoXDDIMScheduler":
                schedule = tabulate(diffusers.CogVideoXDDIMScheduler.from_config(config), num_inference_steps)
                return schedule, [0] * num_inference_steps
            case "CogVideoXDPMScheduler":
                steps = DPMSteps(diffusers.CogVideoXDPMScheduler.from_config(config))
                return tabulate(steps, num_inference_steps), steps.taken
            case name:
                raise InputError(
                    f"scheduler {name!r}: CogVideoX runs with CogVideoXDDIMScheduler or CogVideoXDPMScheduler; change scheduler_config.json"
                )
    except ValueError as error:
        raise InputError(f"scheduler_config.json: {error}; change the setting") from None


class CogVideoXDenoiser:
    def __init__(self, checkpoint: Checkpoint, runtime: Runtime):
        if checkpoint.loras:
            raise InputError(f"lora_path={checkpoint.loras[0].path}: tpuvid-cogvideox doesn't merge LoRA files; leave it out")
        self.scheduler_config = checkpoint.config("scheduler", "scheduler_config.json")
        self.runtime = runtime
        config = checkpoint.config("transformer")
        module = build(lambda: CogVideoXTransformer3DModel.from_config(config))
        self.config = module.config
        if not self.config.use_rotary_positional_embeddings or self.config.use_learned_positional_embeddings:
            raise InputError(
                "this transformer adds its positions (as CogVideoX-2b does); tpuvid-cogvideox runs those with rotary ones"
            )
        self.traced = TracedModule(module, scan={"transformer_blocks": 2})
        widths = split_sizes(self.traced.parameters(runtime.dtype), TRANSFORMER)
        self.mesh = runtime.denoiser_mesh({self.config.num_attention_heads, *widths})
        self.checkpoint = checkpoint
        self.programs = runtime.programs(self.mesh)

    def verify(self) -> None:
        match_parameters(self.traced, self.checkpoint.weights("transformer"))
        make_schedule(self.scheduler_config, 2)

    def load(self) -> None:
        self.params = load_parameters(
            self.traced, self.checkpoint.weights("transformer"), mesh=self.mesh, rules=TRANSFORMER, dtype=self.runtime.dtype
        )

    def check(self, tensors: Mapping[str, np.ndarray]) -> None:
        check_embeds(tensors, self.config.text_embed_dim)

    def denoise(
        self, tensors: Mapping[str, np.ndarray], config: GenerationConfig, on_step: StepCallback
    ) -> Float[np.ndarray, "1 C f h w"]:
        schedule, draws = make_schedule(self.scheduler_config, config.num_inference_steps)
        guided = config.do_classifier_free_guidance
        embeds = tensors["prompt_embeds"]
        if guided:
            embeds = np.concatenate([embeds, tensors["negative_prompt_embeds"]])
        text = jax.device_put(embeds.astype(self.runtime.dtype), batch_sharded(self.mesh, len(embeds)))
        frames, additional = self._latent_frames(config)
        shape = (1, frames, self.config.in_channels, config.height // VAE_SPACE, config.width // VAE_SPACE)
        rotary = jax.device_put(rotary_tables(self.config, frames, *shape[3:]), replicated(self.mesh))
        generator = make_generator(config.seed)
        state = jax.device_put(initial_state(make_noise(shape, generator), schedule), replicated(self.mesh))
        guidance = np.float32(config.guidance_scale)

        slots = DRAWS if any(draws) else 0
        drawn = np.zeros((slots, *shape), np.float32)
        example = (self.params, state, drawn, text, rotary, schedule.timesteps[0], schedule.weights[0], guidance)
        compiled = self.programs.get("denoiser", self._function(guided), *example, donate=(1,))
        counts = iter(draws)

        def step(state, timestep, weights):
            drawn = np.zeros((slots, *shape), np.float32)
            for slot in range(next(counts)):
                drawn[slot] = make_noise(shape, generator)
            return compiled(self.params, state, drawn, text, rotary, timestep, weights, guidance)

        latents = run_steps(step, state, schedule, self.runtime.progress, on_step)
        return np.moveaxis(latents[:, additional:], 1, 2)

    def _latent_frames(self, config: GenerationConfig) -> tuple[int, int]:
        """Latent frames in whole patches, and how many of them are additional."""
        frames = (config.num_frames - 1) // VAE_TIME + 1
        additional = -frames % (self.config.patch_size_t or 1)
        return frames + additional, additional

    def _function(self, guided: bool):
        forward = self.traced.function("forward", return_dict=False)
        dtype = self.runtime.dtype

        def step(
            params,
            state: Float[Array, "K B f C h w"],
            drawn: Float[Array, "n B f C h w"],
            text: Float[Array, "B2 L E"],
            rotary: tuple[Float[Array, "T D"], Float[Array, "T D"]],
            timestep: Float[Array, ""],
            weights: Float[Array, "K K1"],
            guidance: Float[Array, ""],
        ) -> Float[Array, "K B f C h w"]:
            latents = state[0].astype(dtype)
            if guided:  # prompt and negative prompt in one batch
                latents = jax.lax.with_sharding_constraint(
                    jnp.concatenate([latents, latents]), batch_sharded(self.mesh, len(text))
                )
            timesteps = jnp.broadcast_to(timestep, len(latents))
            output = forward(params, latents, text, timesteps, image_rotary_emb=rotary)[0].astype(jnp.float32)
            if guided:
                output = guide(output, guidance)
            state = jnp.concatenate([state[:1], drawn, state[1 + len(drawn) :]])
            return advance(weights, state, output)

        return step
