import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from tpuvid.compute.guidance import guide
from tpuvid.compute.noise import initial_state
from tpuvid.contract import GenerationConfig
from tpuvid.errors import InputError
from tpuvid.family import Schedule, check_embeds, guidance_scales, make_generators, make_noise, with_negative


def test_noise_is_what_diffusers_draws():
    ours, stock = make_generators([123]), torch.Generator("cpu").manual_seed(123)
    for _ in range(2):  # the second draw goes on where the first ended
        expected = randn_tensor((1, 4, 2, 3, 3), generator=stock, dtype=torch.float32)
        assert np.array_equal(make_noise((4, 2, 3, 3), ours), expected.numpy())


def test_guidance_takes_the_prompts_half_first():
    found = guide(jnp.asarray([[3.0, 1.0], [1.0, 1.0]]), jnp.float32(5.0))
    np.testing.assert_allclose(found, [[11.0, 1.0]])


def test_the_state_begins_with_the_noise_and_empty_memories():
    noise = make_noise((2, 1, 2, 2), make_generators([0]))
    state = initial_state(noise, Schedule(np.zeros(1), np.zeros((1, 3, 4))))
    assert state.shape == (3, *noise.shape) and np.array_equal(state[0], noise) and not state[1:].any()


def test_guidance_switched_off_leaves_the_negative_prompt_out():
    config = GenerationConfig(height=8, width=8, num_frames=1, fps=8, num_inference_steps=3, guidance_scale=4.0)
    tensors = {"prompt_embeds": np.ones((1, 2)), "negative_prompt_embeds": np.zeros((1, 2))}
    scales = guidance_scales(config)
    assert scales.tolist() == [4.0] * 3
    assert with_negative(tensors, "prompt_embeds", scales).tolist() == [[1, 1], [0, 0]]
    scales = guidance_scales(config.override(guidance_scale=1.0))
    assert scales is None and with_negative(tensors, "prompt_embeds", scales).tolist() == [[1, 1]]


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
