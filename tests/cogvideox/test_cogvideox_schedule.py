"""The table of the stochastic scheduler, and its random draws, against the scheduler itself."""

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tpuvid import InputError
from tpuvid.compute.noise import initial_state
from tpuvid.compute.schedule import advance
from tpuvid.family import make_generators, make_noise
from tpuvid_cogvideox.denoise import make_schedule
from tpuvid_cogvideox.dpm import DRAWS

PUBLISHED = dict(
    prediction_type="v_prediction",
    rescale_betas_zero_snr=True,
    snr_shift_scale=1.0,
    timestep_spacing="trailing",
    clip_sample=False,
)
SHAPE = (1, 2, 4, 3, 3)


def model(sample, timestep):
    """A nonlinear stand-in for a network, the same in torch and JAX."""
    return sample * (0.3 + timestep / 2000) - sample**3 / 20 + 0.1


def run_stock_dpm(config, steps, seed):
    """As `CogVideoXPipeline.__call__` does; also the generator's state afterwards."""
    scheduler, generator = diffusers.CogVideoXDPMScheduler(**config), torch.Generator().manual_seed(seed)
    scheduler.set_timesteps(steps)
    sample, old, last = torch.randn(SHAPE, generator=generator), None, None
    for t in scheduler.timesteps:
        sample, old = scheduler.step(model(sample, float(t)), old, t, last, sample, generator=generator, return_dict=False)
        last = t
    return sample.numpy(), generator.get_state()


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 30, 50])
@pytest.mark.parametrize(
    "changes", [{}, {"snr_shift_scale": 3.0}, {"timestep_spacing": "leading", "rescale_betas_zero_snr": False}], ids=str
)
def test_dpm_table_equals_scheduler(steps, changes):
    config = PUBLISHED | changes
    expected, generator_state = run_stock_dpm(config, steps, seed=5)
    schedule = make_schedule(config | {"_class_name": "CogVideoXDPMScheduler"}, steps)
    generators = make_generators([5])
    state = jnp.asarray(initial_state(make_noise(SHAPE[1:], generators), schedule))
    for timestep, weights, count in zip(schedule.timesteps, schedule.weights, schedule.draws, strict=True):
        for slot in range(count):
            state = state.at[1 + slot].set(make_noise(SHAPE[1:], generators))
        state = advance(jnp.asarray(weights), state, model(state[0], float(timestep)))
    # fp32 sums in another order, over up to 50 steps
    np.testing.assert_allclose(state[0], expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    assert torch.equal(generators[0].get_state(), generator_state), "another number of draws"


def test_draws_are_the_first_memories_and_ddim_has_none():
    schedule = make_schedule(PUBLISHED | {"_class_name": "CogVideoXDPMScheduler"}, 50)
    assert schedule.draws == (1, *[2] * 48, 1) and schedule.memories == DRAWS + 1
    assert (schedule.weights[1:-1, 0, 1] == 0).all(), "a second-order step throws its first draw away"
    assert (schedule.weights[1:-1, 0, 2] > 0).all()
    schedule = make_schedule(PUBLISHED | {"_class_name": "CogVideoXDDIMScheduler"}, 4)
    assert schedule.draws == () and schedule.memories == 0


def test_other_schedulers_are_refused():
    with pytest.raises(InputError, match="HeunDiscreteScheduler"):
        make_schedule({"_class_name": "HeunDiscreteScheduler"}, 4)
