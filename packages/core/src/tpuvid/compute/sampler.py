"""The denoising loop of every model: noise → latents, one compiled step after the other.

A model brings its prediction, a schedule and its inputs; guidance, step caches, warm-up and profiling are here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Float

from tpuvid.compute import guidance
from tpuvid.compute.bridge import Params
from tpuvid.compute.instruments import Instruments, note_cache
from tpuvid.compute.kernels import Window, attention_window
from tpuvid.compute.moment import Moment, draw_moment, first_moment
from tpuvid.compute.noise import initial_state, restore_generators
from tpuvid.compute.progress import current
from tpuvid.compute.runtime import Program, Runtime, batch_sharded, replicated
from tpuvid.compute.schedule import Schedule, advance
from tpuvid.compute.step_caches import Uncached
from tpuvid.compute.traced import TracedModule
from tpuvid.contract.loop import Loop, LoopState
from tpuvid.contract.settings import GenerationConfig
from tpuvid.contract.stepcache import StepCache
from tpuvid.contract.window_size import WindowSize
from tpuvid.errors import InputError

Predict = Callable[[Params, Array, Array, Any], Array]
"""(params, latents [B, …], timesteps [B], inputs) → the model's output [B, …]; traced. With guidance, B counts both prompts."""

Guide = Callable[[Array, Array], Array]
"""(output for prompt and negative prompt [2B, …], scale) → guided output [B, …], float32; traced."""


class Sampler:
    """One diffusion model's steps on a mesh."""

    def __init__(self, traced: TracedModule, predict: Predict, mesh: Mesh, runtime: Runtime, *, guide: Guide = guidance.guide):
        self.traced, self.predict, self.mesh, self.runtime, self.guide = traced, predict, mesh, runtime, guide
        self.programs = runtime.programs(mesh)

    def sample(
        self,
        params: Params,
        inputs: Any,
        noise: Float[np.ndarray, " ..."],
        schedule: Schedule,
        *,
        scales: Float[np.ndarray, " steps"] | None,
        generators: Sequence[torch.Generator],
        cache: StepCache,
        loop: Loop,
        window: Window | None = None,
        to_latents: Callable[[np.ndarray], np.ndarray] = lambda sample: sample,
    ) -> Float[np.ndarray, " ..."]:
        """The latents after every step of `schedule`; each step is waited for, so that progress and timings are true.

        `inputs` are on the devices; where `scales` (of guidance, by step) are given, the negative prompts' follow the
        prompts' in each batch. `to_latents` makes [B, C, f, h, w] of a sample.
        """
        is_full = cache.full_steps(len(schedule.timesteps))
        begun, state = self._begin(noise, schedule, generators, is_full, loop.start)
        first = first_moment(schedule, scales, noise.shape)
        full, cached = self.compile(params, state, inputs, first, cache, window)
        self._warm_up(full, cached, params, state, inputs, first)
        instruments = Instruments(self.runtime, loop, schedule, generators, to_latents, is_full, begun=begun)
        kept: Any = None
        with instruments.running() as steps:
            for step in steps:
                instruments.before(step, state)
                moment = draw_moment(schedule, scales, noise.shape, generators, step)
                with instruments.profiled(step):
                    if is_full[step]:
                        kept = None  # makes room for what this step keeps
                        state, kept = full(params, state, inputs, moment)
                    else:
                        assert cached is not None, "only a cache that keeps something leaves out steps"
                        state = cached(params, state, kept, inputs, moment)
                    jax.block_until_ready(state)
                instruments.after(step, moment, state)
        if cached:
            note_cache(cache.name, is_full)
        return to_latents(self.runtime.fetch(state[0]))

    def _begin(
        self,
        noise: Float[np.ndarray, " ..."],
        schedule: Schedule,
        generators: Sequence[torch.Generator],
        is_full: Sequence[bool],
        start: LoopState | None,
    ) -> tuple[int, Array]:
        """The first step to compute, and the state before it. Raises `InputError` for a `start` of another run."""
        initial = initial_state(noise, schedule)
        if start is None:
            return 0, self.runtime.put(initial, replicated(self.mesh))
        fits = start.state.shape == initial.shape and start.state.dtype == initial.dtype and np.isfinite(start.state).all()
        if not (fits and 0 < start.step < len(is_full) and is_full[start.step]):
            raise InputError(f"the savepoint after step {start.step} is not of this run; start without it")
        try:
            restore_generators(generators, start.generators)
        except ValueError as error:
            raise InputError(
                f"the savepoint after step {start.step} holds no random state ({error}); start without it"
            ) from None
        return start.step, self.runtime.put(start.state, replicated(self.mesh))

    def window(self, config: GenerationConfig, grid: tuple[int, int, int], *, video_frames: int) -> Window | None:
        """``config.window_size`` over a `grid` of tokens (frames, height, width); each frame is of so many of the video.

        None where there is none, and where it would hide nothing, which is then noted.
        """
        if config.window_size is None:
            return None
        asked, (frames, height, width) = WindowSize.parse(config.window_size), grid
        total = frames * height * width
        if asked.unit == "tokens":
            window = Window.of_tokens(asked.size, total=total)
        else:
            window = Window.of_frames(-(-asked.size // video_frames), tokens_per_frame=height * width, total=total)
        if window is None:
            shown = "all tokens: it hides nothing"
        elif asked.unit == "tokens":
            shown = f"{window.reach} × {window.run} tokens to either side"
        else:
            seen = window.reach * window.run // (height * width)
            shown = f"{seen} frames of tokens ({seen * video_frames} of the video) to either side"
        current().note("window", shown)
        return window

    def compile(
        self, params: Params, state: Any, inputs: Any, moment: Moment, cache: StepCache, window: Window | None
    ) -> tuple[Program, Program | None]:
        """The programs of full and of cached steps for such arguments (arrays or shape structs); None where nothing is kept."""
        names = (
            ("denoiser", "") if isinstance(cache, Uncached) else (f"full step ({cache.name})", f"cached step ({cache.name})")
        )
        get = partial(self.programs.get, donate=(1,), variant=window)
        full = get(names[0], self._full(cache, window), params, state, inputs, moment)
        _, kept = full.out_info
        if not jax.tree.leaves(kept):
            return full, None
        kept = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=s.sharding), kept)
        return full, get(names[1], self._cached(cache, window), params, state, kept, inputs, moment)

    def _full(self, cache: StepCache, window: Window | None) -> Callable[..., Any]:
        def full_step(
            params: Params, state: Float[Array, "K B ..."], inputs: Any, moment: Moment
        ) -> tuple[Float[Array, "K B ..."], Any]:
            latents, timesteps = self._model_inputs(state, moment)
            with attention_window(window):
                output, kept = cache.full(self.traced, self.predict, params, latents, timesteps, inputs)
            return self._update(state, output, moment), kept

        return full_step

    def _cached(self, cache: StepCache, window: Window | None) -> Callable[..., Any]:
        def cached_step(
            params: Params, state: Float[Array, "K B ..."], kept: Any, inputs: Any, moment: Moment
        ) -> Float[Array, "K B ..."]:
            latents, timesteps = self._model_inputs(state, moment)
            with attention_window(window):
                output = cache.cached(self.traced, self.predict, kept, params, latents, timesteps, inputs)
            return self._update(state, output, moment)

        return cached_step

    def _model_inputs(
        self, state: Float[Array, "K B ..."], moment: Moment
    ) -> tuple[Float[Array, "B2 ..."], Float[Array, " B2"]]:
        latents = state[0].astype(self.runtime.dtype)
        if moment.scale is not None:  # prompt and negative prompt in one batch
            latents = jnp.concatenate([latents, latents])
            latents = jax.lax.with_sharding_constraint(latents, batch_sharded(self.mesh, len(latents)))
        return latents, jnp.broadcast_to(moment.timestep, len(latents))

    def _update(
        self, state: Float[Array, "K B ..."], output: Float[Array, "B2 ..."], moment: Moment
    ) -> Float[Array, "K B ..."]:
        output = output.astype(jnp.float32)
        if moment.scale is not None:
            output = self.guide(output, jnp.asarray(moment.scale))
        state = jnp.concatenate([state[:1], moment.drawn, state[1 + len(moment.drawn) :]])
        return jax.lax.with_sharding_constraint(advance(jnp.asarray(moment.weights), state, output), replicated(self.mesh))

    def _warm_up(
        self, full: Program, cached: Program | None, params: Params, state: Array, inputs: Any, moment: Moment
    ) -> None:
        """Run the programs on copies: neither the sample, nor what a cache keeps, nor the generator is touched."""
        if not self.runtime.warmup_steps:
            return
        with current().phase("warm up"):
            for _ in range(self.runtime.warmup_steps):
                scratch, kept = full(params, jnp.copy(state), inputs, moment)
                if cached:
                    scratch = cached(params, scratch, kept, inputs, moment)
                jax.block_until_ready(scratch)
