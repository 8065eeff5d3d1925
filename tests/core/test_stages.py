import dataclasses
import math
import re

import pytest
from tpuvid.contract import GenerationConfig, SizeRules
from tpuvid.contract.settings import check_sampling
from tpuvid.errors import InputError

CONFIG = GenerationConfig(height=64, width=64, num_frames=17, fps=8, num_inference_steps=10, guidance_scale=4.0)
RULES = SizeRules(frame_step=4, size_multiple=16, max_frames=81, max_size=1280)


@pytest.mark.parametrize("frames", [1, 5, 77, 81])
def test_valid_sizes_pass(frames):
    RULES.check(height=16, width=1280, num_frames=frames)


@pytest.mark.parametrize(
    "sizes, message",
    [
        (dict(num_frames=80), "num_frames=80: needs 4n.1 frames up to 81; nearest: 77 and 81"),
        (dict(num_frames=0), "nearest: 1$"),
        (dict(num_frames=-3), "nearest: 1$"),
        (dict(num_frames=1000), "nearest: 81$"),
        (dict(height=100), "height=100: needs a multiple of 16 up to 1280; nearest: 96 and 112"),
        (dict(width=0), "width=0: .* nearest: 16$"),
        (dict(width=2000), "nearest: 1280$"),
    ],
)
def test_invalid_sizes_name_the_nearest(sizes, message):
    with pytest.raises(InputError, match=message):
        RULES.check(**{"height": 64, "width": 64, "num_frames": 17} | sizes)


@pytest.mark.parametrize("step, frames", [(1, 7), (8, 9)])
def test_nearest_frames_are_themselves_valid(step, frames):
    rules = SizeRules(frame_step=step, size_multiple=8, max_frames=100, max_size=64)
    rules.check(height=8, width=8, num_frames=frames)


@pytest.mark.parametrize(
    "change",
    [
        dict(num_inference_steps=0), dict(num_inference_steps=-1), dict(num_inference_steps=10**6), dict(fps=0),
        dict(guidance_scale=math.nan), dict(guidance_scale=math.inf), dict(guidance_scale=-0.1), dict(prompt=["a", "b"]),
        dict(prompt=None), dict(height="64"), dict(num_frames=17.0), dict(num_inference_steps=2.5),
        dict(num_inference_steps=True), dict(seed=1.5), dict(guidance_scale="3"), dict(flow_shift=0.0),
        dict(flow_shift=math.nan), dict(seed=-2), dict(seed=2**63), dict(max_sequence_length=0),
    ],
)  # fmt: skip
def test_settings_that_no_model_could_run_are_refused(change):
    ((name, value),) = change.items()
    with pytest.raises(InputError, match=rf"{name}={re.escape(repr(value))}: needs"):
        check_sampling(dataclasses.replace(CONFIG, **change))


def test_override_keeps_what_is_not_given():
    assert CONFIG.override(height=32, width=None) == dataclasses.replace(CONFIG, height=32)
    with pytest.raises(InputError, match="heigth: no such setting"):
        CONFIG.override(heigth=3)


def test_guidance_needs_more_than_one():
    assert not dataclasses.replace(CONFIG, guidance_scale=1.0).do_classifier_free_guidance
    assert dataclasses.replace(CONFIG, guidance_scale=1.01).do_classifier_free_guidance
