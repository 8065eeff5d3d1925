"""Stage 2 of LTX-Video: noise → latents by flow matching. Source: `LTXPipeline.__call__` of diffusers."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LTXVideoTransformer3DModel
from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift
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

from tpuvid_ltx.attention import SplitTokenAttention
from tpuvid_ltx.sharding import TRANSFORMER

BLOCKS = Scan(1, tokens={"hidden_states": 1, "image_rotary_emb": 1})
VAE_TIME, VAE_SPACE = 8, 32  # pixels per latent of every LTX-Video VAE


def make_schedule(config: Mapping, steps: int, grid: tuple[int, int, int]) -> Schedule:
    """The checkpoint's own scheduler, shifted for a video of as many tokens as `grid` has latents."""
    if (name := config.get("_class_name")) != "FlowMatchEulerDiscreteScheduler":
        raise InputError(f"scheduler {name!r}: needs FlowMatchEulerDiscreteScheduler; change scheduler_config.json")
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    own = scheduler.config
    mu = calculate_shift(np.prod(grid), own.base_image_seq_len, own.max_image_seq_len, own.base_shift, own.max_shift)
    try:
        return tabulate(scheduler, steps, sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
    except ValueError as error:
        raise InputError(f"num_inference_steps={steps}: {error}; change it, or scheduler_config.json") from None


def latent_grid(config: GenerationConfig) -> tuple[int, int, int]:
    """Frames, height and width."""
    return (config.num_frames - 1) // VAE_TIME + 1, config.height // VAE_SPACE, config.width // VAE_SPACE


class LTXDenoiser:
    def __init__(self, checkpoint: Checkpoint, runtime: Runtime):
        self.checkpoint, self.runtime = checkpoint, runtime
        self.scheduler_config = checkpoint.config("scheduler", "scheduler_config.json")
        module = build(lambda: LTXVideoTransformer3DModel.from_config(checkpoint.config("transformer")))
        self.config, self.rope = module.config, module.rope
        if (patch := (self.config.patch_size_t, self.config.patch_size)) != (1, 1):
            raise InputError(f"patch_size_t, patch_size={patch}: tpuvid-ltx runs patches of one latent, as LTX-Video has")
        # Tables are given, as `video_coords`. Angles reach 15,708 radians: the last bit of a float32 shows in the video, so
        # they are computed as the reference does, on the host.
        module.rope.forward = lambda *given: given[-1]
        module.set_attn_processor(SplitTokenAttention())
        self.traced = TracedModule(module, scan={"transformer_blocks": BLOCKS})
        self.mesh = runtime.denoiser_mesh(self.traced, self.config.num_attention_heads, TRANSFORMER)
        self.sampler = Sampler(self.traced, self._predict, self.mesh, runtime)

    def verify(self) -> None:
        match_parameters(self.traced, self.checkpoint.weights("transformer"))
        make_schedule(self.scheduler_config, 2, (1, 1, 1))

    def load(self) -> None:
        weights, dtype = self.checkpoint.weights("transformer"), self.runtime.dtype
        self.params = load_parameters(self.traced, weights, mesh=self.mesh, rules=TRANSFORMER, dtype=dtype)

    def resolve(self, config: GenerationConfig) -> GenerationConfig:
        make_schedule(self.scheduler_config, config.num_inference_steps, latent_grid(config))  # fails if it can't
        return config  # the checkpoint decides nothing that a setting could

    def check(self, tensors: Mapping[str, np.ndarray]) -> None:
        check_embeds(tensors, self.config.caption_channels)
        for name in sorted({"prompt_embeds", "negative_prompt_embeds"} & set(tensors)):
            mask_name, length = name.replace("embeds", "attention_mask"), tensors[name].shape[1]
            mask = tensors.get(mask_name, np.zeros(0))
            if mask.shape != (1, length) or not np.isin(mask, (0, 1)).all() or not mask.any():
                raise InputError(f"{mask_name} is no mask [1, {length}] of 0 and 1 that keeps a token; encode with this model")

    def denoise(self, tensors: Mapping[str, np.ndarray], config: GenerationConfig, loop: Loop) -> Mapping[str, np.ndarray]:
        scales, grid = guidance_scales(config), latent_grid(config)
        text = with_negative(tensors, "prompt_embeds", scales).astype(self.runtime.dtype)
        mask = with_negative(tensors, "prompt_attention_mask", scales)[:, None, None] != 0
        rotary = type(self.rope).forward(self.rope, torch.empty(1), *grid, (VAE_TIME / config.fps, VAE_SPACE, VAE_SPACE))
        prompt = {"encoder_hidden_states": text, "encoder_attention_mask": mask}
        inputs = self.runtime.put(prompt, batch_sharded(self.mesh, len(text)))
        inputs["video_coords"] = self.runtime.put(tuple(table.numpy() for table in rotary), replicated(self.mesh))
        schedule = make_schedule(self.scheduler_config, config.num_inference_steps, grid)
        generators = make_generators(loop.seeds)
        noise = make_noise((self.config.in_channels, *grid), generators)
        latents = self.sampler.sample(
            self.params, inputs, noise, schedule, scales=scales, generators=generators, cache=step_cache(config), loop=loop,
            window=self.sampler.window(config, grid, video_frames=VAE_TIME),
        )  # fmt: skip
        return {"latents": latents}

    def _predict(self, params, latents: Float[Array, "B C f h w"], timesteps: Float[Array, " B"], inputs):
        """The velocity. `inputs`, by the forward's names: embeddings [B, L, E], a mask over them, rotary tables [1, T, C]."""
        tokens = jnp.swapaxes(latents.reshape(*latents.shape[:2], -1), 1, 2)
        (velocity,) = self.traced.function("forward", return_dict=False)(params, tokens, timestep=timesteps, **inputs)
        return jnp.swapaxes(velocity, 1, 2).reshape(latents.shape)
