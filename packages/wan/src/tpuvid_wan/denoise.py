"""Stage 2 of Wan: noise → latents by flow matching. Source: `WanPipeline.__call__` of diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import jax
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float
from torch import nn
from tpuvid.contract import GenerationConfig, Loop
from tpuvid.errors import InputError
from tpuvid.family import (
    LEAST_EFFORT,
    Checkpoint,
    Runtime,
    Sampler,
    Scan,
    Schedule,
    TracedModule,
    Weights,
    batch_sharded,
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

from tpuvid_wan.lora import adapt
from tpuvid_wan.sharding import TRANSFORMER

SCHEDULERS = {"UniPCMultistepScheduler": "flow_shift", "FlowMatchEulerDiscreteScheduler": "shift"}
"""What the configuration of each scheduler class calls the shift."""
BLOCKS = Scan(1, tokens={"hidden_states": 1, "rotary_emb": 1}, per_block=("encoder_hidden_states",))
VAE_TIME, VAE_SPACE = 4, 8  # pixels per latent of every Wan 2.1 VAE


def make_schedule(config: Mapping, num_inference_steps: int, flow_shift: float | None) -> Schedule:
    """The checkpoint's own scheduler, with another shift where one is given."""
    name = config.get("_class_name")
    if name not in SCHEDULERS:
        raise InputError(f"scheduler {name!r}: Wan runs with {' or '.join(SCHEDULERS)}; change scheduler_config.json")
    changes = {} if flow_shift is None else {SCHEDULERS[name]: flow_shift}
    import diffusers

    try:
        return tabulate(getattr(diffusers, name).from_config(config, **changes), num_inference_steps)
    except ValueError as error:
        raise InputError(f"scheduler_config.json: {error}; change the setting") from None


class WanDenoiser:
    rules: ClassVar = TRANSFORMER

    def build(self) -> nn.Module:
        """The module of `config`, without weights."""
        from tpuvid_wan.transformer import build_transformer  # diffusers is imported when something has to be traced

        return build_transformer(self.config)

    def __init__(self, checkpoint: Checkpoint, runtime: Runtime):
        self.config = checkpoint.config("transformer")
        self.scheduler_config = checkpoint.config("scheduler", "scheduler_config.json")
        self.runtime = runtime
        self.traced = TracedModule(self.build, scan={"blocks": BLOCKS}, kept=runtime.kept.outlines, key=self.config)
        self.mesh = runtime.denoiser_mesh(self.traced, self.traced.config.num_attention_heads, self.rules)
        self.checkpoint = checkpoint
        self.sampler = Sampler(self.traced, self._predict, self.mesh, runtime)
        self.once = runtime.programs(self.mesh, effort=LEAST_EFFORT)

    def verify(self) -> None:
        match_parameters(self.traced, self._weights())
        self._schedule(2, None)

    def load(self) -> None:
        self.params = load_parameters(self.traced, self._weights(), mesh=self.mesh, rules=self.rules, dtype=self.runtime.dtype)
        self.params |= self.runtime.put(self.traced.buffers(), replicated(self.mesh))

    def _weights(self) -> Weights:
        return adapt(self.checkpoint.weights("transformer"), self.checkpoint.loras)

    def resolve(self, config: GenerationConfig) -> GenerationConfig:
        own = self.scheduler_config.get(SCHEDULERS[self.scheduler_config["_class_name"]], 1.0)
        config = config.override(flow_shift=own) if config.flow_shift is None else config
        self._schedule(config.num_inference_steps, config.flow_shift)  # fails for steps that it can't make
        return config

    def check(self, tensors: Mapping[str, np.ndarray]) -> None:
        check_embeds(tensors, self.traced.config.text_dim)

    def denoise(self, tensors: Mapping[str, np.ndarray], config: GenerationConfig, loop: Loop) -> Mapping[str, np.ndarray]:
        schedule = self._schedule(config.num_inference_steps, config.flow_shift)
        scales = guidance_scales(config)
        embeds = with_negative(tensors, "prompt_embeds", scales).astype(self.runtime.dtype)
        text = self._prompt(self.runtime.put(embeds, batch_sharded(self.mesh, len(embeds))))
        generators = make_generators(loop.seeds)
        noise = make_noise(self._latent_shape(config), generators)
        patches = self.traced.config.patch_size
        grid = tuple(size // patch for size, patch in zip(noise.shape[2:], patches, strict=True))
        latents = self.sampler.sample(
            self.params, text, noise, schedule, scales=scales, generators=generators, cache=step_cache(config), loop=loop,
            window=self.sampler.window(config, grid, video_frames=VAE_TIME * patches[0]),
        )  # fmt: skip
        return {"latents": latents}

    def _predict(
        self,
        params,
        latents: Float[Array, "B2 C f h w"],
        timesteps: Float[Array, " B2"],
        text: Float[Array, "depth B2 2 N L D"],
    ) -> Float[Array, "B2 C f h w"]:
        """The velocity."""
        return self.traced.function("forward", return_dict=False)(params, latents, timesteps, text)[0]

    def _prompt(self, text: Float[Array, "B2 L E"]) -> Float[Array, "depth B2 2 N L D"]:
        """Keys and values of the prompt for every block."""
        batch = batch_sharded(self.mesh, len(text)).spec
        sharding = NamedSharding(self.mesh, PartitionSpec(None, *(batch or (None,)), None, "tp"))

        def keys_values(params, text):
            found = self.traced.function("prompt_keys_values")(params, text)
            return jax.lax.with_sharding_constraint(found, sharding)

        return self.once.get("prompt's keys and values", keys_values, self.params, text)(self.params, text)

    def _schedule(self, num_inference_steps: int, flow_shift: float | None) -> Schedule:
        wanted = self.scheduler_config, num_inference_steps, flow_shift
        return Schedule.kept(self.runtime.kept.outlines, wanted, lambda: make_schedule(*wanted))

    def _latent_shape(self, config: GenerationConfig) -> tuple[int, int, int, int]:
        channels = self.traced.config.in_channels
        frames = (config.num_frames - 1) // VAE_TIME + 1
        return channels, frames, config.height // VAE_SPACE, config.width // VAE_SPACE
