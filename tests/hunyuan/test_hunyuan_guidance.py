"""Guidance and schedule against the guider and the scheduler of diffusers."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import ClassifierFreeGuidance, FlowMatchEulerDiscreteScheduler
from tpuvid import InputError
from tpuvid_hunyuan.denoise import make_schedule
from tpuvid_hunyuan.guidance import Guidance
from tpuvid_hunyuan.plugin import HUNYUAN_720P

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
    config = HUNYUAN_720P.configure(guidance_scale=3.5, num_inference_steps=count)
    scales = guidance.scales(config)
    for step in range(count):
        stock.set_state(step, count, None)
        expected = stock.forward(conditional, unconditional).pred.numpy()
        found = output[:1] if scales is None else guidance.guide(output, scales[step])
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)
    assert (scales is None) == all(stock.set_state(step, count, None) or stock.num_conditions == 1 for step in range(count))
    assert guidance.scales(config.override(guidance_scale=1.0)) is None


@pytest.mark.parametrize("original, refused, taken", [(False, (0.0, 0.5), (1.0, 1.5)), (True, (0.5, 1.0), (0.0, 1.5))])
def test_scales_that_would_mean_something_else_are_refused(original, refused, taken):
    """The stock guider guides with them, tpuvid switches guidance off up to 1."""
    guidance = Guidance(use_original_formulation=original)
    for scale in refused:
        with pytest.raises(InputError, match=f"guidance_scale={scale}: this checkpoint's guider takes"):
            guidance.resolve(scale)
    assert [guidance.resolve(scale) for scale in taken] == list(taken)
    assert guidance.resolve(None) == 7.5


def test_a_guider_that_is_off_takes_no_scale():
    guidance = Guidance(enabled=False, guidance_scale=6.0)
    assert guidance.resolve(None) == guidance.resolve(1.0) == 1.0
    with pytest.raises(InputError, match="guidance_scale=8.0: this checkpoint's guider is switched off"):
        guidance.resolve(8.0)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"_class_name": "AdaptiveProjectedGuidance"}, "guider 'AdaptiveProjectedGuidance': HunyuanVideo runs with"),
        ({"_class_name": "ClassifierFreeGuidance", "momentum": 1}, "momentum: no setting"),
        ({"_class_name": "ClassifierFreeGuidance", "start": 0.5, "stop": 0.2}, "start=0.5, stop=0.2"),
        ({"_class_name": "ClassifierFreeGuidance", "guidance_scale": "six"}, "guidance_scale='six': needs a finite number"),
        ({"_class_name": "ClassifierFreeGuidance", "guidance_scale": None}, "guidance_scale=None: needs a finite number"),
        ({"_class_name": "ClassifierFreeGuidance", "guidance_scale": float("nan")}, "guidance_scale=nan: needs a finite"),
        (
            {"_class_name": "ClassifierFreeGuidance", "guidance_rescale": 5.0},
            "guidance_rescale=5.0: needs a number from 0 to 1",
        ),
        ({"_class_name": "ClassifierFreeGuidance", "enabled": "no"}, "enabled='no': needs true or false"),
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
