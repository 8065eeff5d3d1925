"""Guidance and schedule against the guider and the scheduler of diffusers."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import ClassifierFreeGuidance, FlowMatchEulerDiscreteScheduler
from tpuvid import InputError
from tpuvid_hunyuan.denoise import make_schedule
from tpuvid_hunyuan.guidance import Guidance

SETTINGS = [
    {},
    {"guidance_rescale": 0.7},
    {"use_original_formulation": True},
    {"use_original_formulation": True, "guidance_rescale": 1.0, "start": 0.1},
    {"start": 0.25, "stop": 0.8},
    {"stop": 0.0},
    {"enabled": False},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("count", [1, 3, 50])
def test_guides_as_the_stock_guider(settings, count):
    stock = ClassifierFreeGuidance(guidance_scale=3.5, **settings)
    guidance = Guidance.from_config(dict(stock.config) | {"_class_name": "ClassifierFreeGuidance", "_diffusers_version": "0"})
    torch.manual_seed(count)
    conditional, unconditional = torch.randn(2, 1, 3, 2, 4, 5)
    output = jnp.concatenate([conditional.numpy(), unconditional.numpy()])
    for step, guided in enumerate(guidance.steps(count)):
        stock.set_state(step, count, None)
        assert guided == (stock.num_conditions == 2), step
        expected = stock.forward(conditional, unconditional).pred.numpy()
        found = guidance.guide(output, np.float32(3.5)) if guided else output[:1]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"_class_name": "AdaptiveProjectedGuidance"}, "guider 'AdaptiveProjectedGuidance': HunyuanVideo runs with"),
        ({"_class_name": "ClassifierFreeGuidance", "momentum": 1}, "momentum: no setting"),
        ({"_class_name": "ClassifierFreeGuidance", "start": 0.5, "stop": 0.2}, "start=0.5, stop=0.2"),
    ],
)
def test_other_guiders_are_refused(config, message):
    with pytest.raises(InputError, match=message):
        Guidance.from_config(config)


@pytest.mark.parametrize("flow_shift", [None, 9.0])
def test_schedule_is_the_pipelines(flow_shift):
    config = dict(FlowMatchEulerDiscreteScheduler(shift=5.0).config) | {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    schedule = make_schedule(config, 7, flow_shift)
    stock = FlowMatchEulerDiscreteScheduler(shift=flow_shift or 5.0)
    stock.set_timesteps(sigmas=np.linspace(1.0, 0.0, 8)[:-1])
    np.testing.assert_array_equal(schedule.timesteps, stock.timesteps.numpy())
    # Euler: sample + (next σ − σ) · velocity
    np.testing.assert_allclose(schedule.weights[:, 0, 0], 1)
    np.testing.assert_allclose(schedule.weights[:, 0, 1], np.diff(stock.sigmas.numpy()), rtol=1e-6)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"_class_name": "UniPCMultistepScheduler"}, "UniPCMultistepScheduler"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}, "mu"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "stochastic_sampling": True}, "not linear"),
    ],
)
def test_other_schedulers_are_refused(config, message):
    with pytest.raises(InputError, match=message):
        make_schedule(config, 4, None)
