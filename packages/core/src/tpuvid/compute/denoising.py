"""The denoising loop of every model: noise → latents, one compiled step after the other.

A model brings its prediction, a schedule and its inputs; guidance, step caches, warm-up and profiling are here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Float

from tpuvid.compute import sampling
from tpuvid.compute.bridge import Params
from tpuvid.compute.kernels import Window, attention_window
from tpuvid.compute.profiling import StepProfiler
from tpuvid.compute.runtime import Program, Runtime, batch_sharded, replicated
from tpuvid.compute.schedule import Schedule, advance, estimate
from tpuvid.compute.step_caches import Uncached
from tpuvid.compute.traced import TracedModule
from tpuvid.contract.loop import Loop, LoopState, StepDone
from tpuvid.contract.settings import GenerationConfig
from tpuvid.contract.stepcache import StepCache, ranges
from tpuvid.contract.window_size import WindowSize
from tpuvid.errors import InputError

Predict = Callable[[Params, Array, Array, Any], Array]
"""(params, latents [B, …], timesteps [B], inputs) → the model's output [B, …]; traced. With guidance, B counts both prompts."""

Guide = Callable[[Array, Array], Array]
"""(output for prompt and negative prompt [2B, …], scale) → guided output [B, …], float32; traced."""


class Moment(NamedTuple):
    """What changes from step to step; made by the host."""

    timestep: Float[np.ndarray, ""]
    weights: Float[np.ndarray, "K K1"]
    """The scheduler's weights: see `Schedule.weights`."""
    scale: Float[np.ndarray, ""] | None
    """The scale of guidance; None where it is off."""
    drawn: Float[np.ndarray, "n ..."]
    """Normal noise for a stochastic scheduler's first n memories."""


class Sampler:
    """One diffusion model's steps on a mesh."""

    def __init__(self, traced: TracedModule, predict: Predict, mesh: Mesh, runtime: Runtime, *, guide: Guide = sampling.guide):
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
        total, progress = len(schedule.timesteps), self.runtime.progress
        is_full = cache.full_steps(total)
        begun, state = self._begin(noise, schedule, generators, is_full, loop.start)
        first = first_moment(schedule, scales, noise.shape)
        full, cached = self.compile(params, state, inputs, first, cache, window)
        if self.runtime.warmup_steps:
            with progress.phase("warm up"):
                self._warm_up(full, cached, params, state, inputs, first)

        kept: Any = None
        resumable: Callable[[], LoopState] | None = None
        steps = progress.steps("denoise", total, begun)
        with steps as report, StepProfiler(self.runtime.profile, is_full, progress) as profiler, loop.running():
            for step in range(begun, total):
                if loop.after_step and cached and is_full[step]:
                    resumable = self._state(step, jnp.copy(state), generators)
                moment = _moment(schedule, scales, noise.shape, generators, step)
                before = jnp.copy(state) if loop.estimates_after(step + 1) else None
                with profiler.step(step):
                    if is_full[step]:
                        kept = None  # makes room for what this step keeps
                        state, kept = full(params, state, inputs, moment)
                    else:
                        assert cached is not None, "only a cache that keeps something leaves out steps"
                        state = cached(params, state, kept, inputs, moment)
                    jax.block_until_ready(state)
                report(step + 1)
                if loop.after_step:
                    if step + 1 == total or is_full[step + 1]:
                        resumable = self._state(step + 1, state, generators)
                    assert resumable is not None, "the first step is a full one"
                    seen = self._estimate(schedule, step, before, moment, state, to_latents)
                    loop.after_step(StepDone(step + 1, total, state=resumable, estimate=seen))
        if profiler.written:
            progress.note("profile", str(profiler.written))
        if begun:
            progress.note("resumed", f"after step {begun}")
        if cached:
            found = {
                what: ranges(i for i in range(total) if is_full[i] is flag)
                for what, flag in (("full", True), ("cached", False))
            }
            progress.note("cache", {"name": cache.name, **found, "saved_steps": is_full.count(False)})
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
        initial = sampling.initial_state(noise, schedule)
        if start is None:
            return 0, self.runtime.put(initial, replicated(self.mesh))
        fits = start.state.shape == initial.shape and start.state.dtype == initial.dtype and np.isfinite(start.state).all()
        if not (fits and 0 < start.step < len(is_full) and is_full[start.step]):
            raise InputError(f"the checkpoint after step {start.step} is not of this run; start without it")
        try:
            sampling.restore_generators(generators, start.generators)
        except ValueError as error:
            raise InputError(
                f"the checkpoint after step {start.step} holds no random state ({error}); start without it"
            ) from None
        return start.step, self.runtime.put(start.state, replicated(self.mesh))

    def _state(self, step: int, state: Array, generators: Sequence[torch.Generator]) -> Callable[[], LoopState]:
        """What a run goes on from before `step`; fetched when it is asked for."""
        drawn = sampling.generator_states(generators)
        return lambda: LoopState(step, self.runtime.fetch(state), drawn)

    def _estimate(
        self,
        schedule: Schedule,
        step: int,
        before: Array | None,
        moment: Moment,
        after: Array,
        to_latents: Callable[[np.ndarray], np.ndarray],
    ) -> Callable[[], Callable[[], np.ndarray]]:
        def fetched() -> Callable[[], np.ndarray]:
            known, found = self.runtime.fetch(before), self.runtime.fetch(after)
            if len(moment.drawn):
                known = np.concatenate([known[:1], moment.drawn, known[1 + len(moment.drawn) :]])
            return lambda: to_latents(estimate(schedule, step, known, found))

        return fetched

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
        self.runtime.progress.note("window", shown)
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
        for _ in range(self.runtime.warmup_steps):
            scratch, kept = full(params, jnp.copy(state), inputs, moment)
            if cached:
                scratch = cached(params, scratch, kept, inputs, moment)
            jax.block_until_ready(scratch)


def first_moment(schedule: Schedule, scales: np.ndarray | None, shape: tuple[int, ...]) -> Moment:
    """The first step's moment, with zeros for what a stochastic scheduler would draw."""
    drawn = np.zeros((max(schedule.draws, default=0), *shape), np.float32)
    return Moment(schedule.timesteps[0], schedule.weights[0], None if scales is None else scales[0], drawn)


def _moment(
    schedule: Schedule, scales: np.ndarray | None, shape: tuple[int, ...], generators: Sequence[torch.Generator], step: int
) -> Moment:
    """The moment of `step`; what it draws is drawn now. `shape` is the batch's."""
    drawn = first_moment(schedule, scales, shape).drawn
    for slot in range(schedule.draws[step] if schedule.draws else 0):
        drawn[slot] = sampling.make_noise(shape[1:], generators)
    return Moment(schedule.timesteps[step], schedule.weights[step], None if scales is None else scales[step], drawn)
