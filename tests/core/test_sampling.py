import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from tpuvid.errors import InputError
from tpuvid.progress import Progress
from tpuvid.sampling import check_embeds, guide, initial_state, make_generator, make_noise, run_steps
from tpuvid.schedule import advance, tabulate


def test_noise_is_what_diffusers_draws():
    ours, stock = make_generator(123), torch.Generator("cpu").manual_seed(123)
    for _ in range(2):  # the second draw goes on where the first ended
        expected = randn_tensor((1, 4, 2, 3, 3), generator=stock, dtype=torch.float32)
        assert np.array_equal(make_noise((1, 4, 2, 3, 3), ours), expected.numpy())


def test_guidance_takes_the_prompts_half_first():
    found = guide(jnp.asarray([[3.0, 1.0], [1.0, 1.0]]), jnp.float32(5.0))
    np.testing.assert_allclose(found, [[11.0, 1.0]])


def test_steps_run_in_order_and_report():
    schedule = tabulate(diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True), 3)
    noise = make_noise((1, 2, 1, 2, 2), make_generator(0))
    state, seen, told = initial_state(noise, schedule), [], []
    assert state.shape == (schedule.memories + 1, *noise.shape) and np.array_equal(state[0], noise) and not state[1:].any()

    def step(state, timestep, weights):
        told.append(float(timestep))
        return advance(jnp.asarray(weights), state, state[0] * timestep / 1000)

    found = run_steps(step, jnp.asarray(state), schedule, Progress(), lambda done, total: seen.append((done, total)))
    assert found.shape == noise.shape and np.isfinite(found).all() and not np.array_equal(found, noise)
    assert seen == [(1, 3), (2, 3), (3, 3)] and told == list(schedule.timesteps)


def test_an_exception_in_the_callback_stops_the_run():
    schedule = tabulate(diffusers.FlowMatchEulerDiscreteScheduler(), 4)
    ran = []

    def cancel(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_steps(lambda state, *_: ran.append(state) or state, jnp.zeros((1, 2)), schedule, Progress(), cancel)
    assert len(ran) == 1


@pytest.mark.parametrize(
    "negative, message",
    [
        (np.zeros((1, 4, 6), np.float32), "1, 4, 6"),
        (np.zeros((1, 3, 5), np.float32), "3, 5"),
        (np.zeros((1, 3, 6), np.int32), "int32"),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(negative, message):
    good = np.zeros((1, 3, 6), np.float32)
    check_embeds({"prompt_embeds": good, "negative_prompt_embeds": good}, 6)
    check_embeds({"prompt_embeds": good}, 6)
    with pytest.raises(InputError, match=f"negative_prompt_embeds is .*{message}.*this model takes"):
        check_embeds({"prompt_embeds": good, "negative_prompt_embeds": negative}, 6)
    for bad in (np.zeros((2, 3, 6), np.float32), np.zeros((1, 0, 6), np.float32), np.zeros((3, 6), np.float32)):
        with pytest.raises(InputError, match="prompt_embeds is"):
            check_embeds({"prompt_embeds": bad}, 6)
