import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tpuvid.compute.schedule import advance, estimate
from tpuvid.family import Schedule, tabulate

FLOW_UNIPC = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def run_diffusers(scheduler, steps, sample, model):
    scheduler.set_timesteps(steps)
    sample = torch.from_numpy(sample)
    for timestep in scheduler.timesteps:
        sample = scheduler.step(model(sample, float(timestep)), timestep, sample, return_dict=False)[0]
    return sample.numpy()


def run_table(scheduler, steps, sample, model):
    schedule = tabulate(scheduler, steps)
    state = jnp.concatenate([jnp.asarray(sample)[None], jnp.zeros((schedule.memories, *sample.shape))])
    for timestep, weights in zip(schedule.timesteps, schedule.weights, strict=True):
        state = advance(jnp.asarray(weights), state, model(state[0], float(timestep)))
    return np.asarray(state[0])


def model(sample, timestep):
    """A nonlinear stand-in for a network, the same in torch and JAX."""
    return sample * (0.3 + timestep / 2000) - sample**3 / 20 + 0.1


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 30])
@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.UniPCMultistepScheduler(**FLOW_UNIPC),
        diffusers.UniPCMultistepScheduler(**FLOW_UNIPC, solver_order=3),
        diffusers.UniPCMultistepScheduler(**FLOW_UNIPC, disable_corrector=[0, 1]),
        diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
        diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        diffusers.DDIMScheduler(clip_sample=False, prediction_type="v_prediction", timestep_spacing="trailing"),
    ],
    ids=lambda s: f"{type(s).__name__}-{s.config.get('solver_type', '')}{s.config.get('solver_order', '')}",
)
def test_table_equals_scheduler(scheduler, steps):
    sample = np.random.default_rng(0).normal(size=(1, 4, 2, 3, 3)).astype(np.float32)
    expected = run_diffusers(type(scheduler).from_config(scheduler.config), steps, sample, model)
    found = run_table(scheduler, steps, sample, model)
    # fp32 sums in another order, over up to 30 steps
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_stochastic_scheduler_is_refused():
    with pytest.raises(ValueError, match="not linear"):
        tabulate(diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), 4)


def test_nonlinear_scheduler_is_refused():
    with pytest.raises(ValueError, match="not linear"):
        tabulate(diffusers.DDIMScheduler(clip_sample=True, clip_sample_range=0.1), 4)


@pytest.mark.parametrize("steps", [1, 6])
def test_thresholding_is_refused(steps):
    """Linear near zero, where most samples are."""
    with pytest.raises(ValueError, match="not linear"):
        tabulate(diffusers.UniPCMultistepScheduler(**FLOW_UNIPC, thresholding=True, sample_max_value=3.0), steps)


def test_undefined_samples_are_refused():
    """bh1 divides infinity by infinity in its last step, in diffusers too."""
    with pytest.raises(ValueError, match="infinite or undefined"):
        tabulate(diffusers.UniPCMultistepScheduler(**FLOW_UNIPC, solver_type="bh1"), 4)


def test_two_evaluations_per_step_are_refused():
    with pytest.raises(ValueError, match="more than once per step"):
        tabulate(diffusers.HeunDiscreteScheduler(), 4)


def _alpha(scheduler, step):
    return scheduler.alphas_cumprod[int(scheduler.timesteps[step])]


@pytest.mark.parametrize(
    "scheduler, denoised",
    [
        (diffusers.UniPCMultistepScheduler(**FLOW_UNIPC), lambda s, i: (1.0, -float(s.sigmas[i]))),
        (diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0), lambda s, i: (1.0, -float(s.sigmas[i]))),
        (
            diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction"),
            lambda s, i: (float(_alpha(s, i)) ** 0.5, -float(1 - _alpha(s, i)) ** 0.5),
        ),
    ],
    ids=["UniPC", "Euler", "DDIM"],
)  # fmt: skip
def test_the_denoised_sample_follows_from_two_states(scheduler, denoised):
    """Without the model's output, which no program gives back."""
    schedule = tabulate(scheduler, 6)
    scheduler.set_timesteps(6)
    rng = np.random.default_rng(0)
    state = np.zeros((schedule.memories + 1, 7), np.float32)
    state[0] = rng.normal(size=7)
    for step in range(6):
        output = rng.normal(size=7).astype(np.float32)
        after = np.asarray(advance(jnp.asarray(schedule.weights[step]), jnp.asarray(state), jnp.asarray(output)))
        a, b = denoised(scheduler, step)
        expected = a * state[0] + b * output if step < 5 else after[0]
        np.testing.assert_allclose(estimate(schedule, step, state, after), expected, rtol=0, atol=1e-4)
        state = after


def test_ddims_estimate_is_the_schedulers_own():
    scheduler = diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    schedule = tabulate(scheduler, 5)
    scheduler.set_timesteps(5)
    sample, output = torch.randn(2, 1, 1, 1, 9, dtype=torch.float64)
    own = scheduler.step(output, scheduler.timesteps[2], sample, return_dict=True).pred_original_sample
    a, b = schedule.denoised[2]
    torch.testing.assert_close(a * sample + b * output, own, rtol=1e-5, atol=1e-5)


def test_where_nothing_is_known_the_sample_is_shown():
    schedule = Schedule(np.arange(2.0), np.ones((2, 1, 2), np.float32))
    after = np.ones((1, 3), np.float32)
    assert np.array_equal(estimate(schedule, 0, 2 * after, after), after[0])
