"""The keys of what is kept of runs are views of one identity."""

from dataclasses import fields, replace

import pytest
from tpuvid.compute.runtime import Runtime
from tpuvid.contract import GenerationConfig
from tpuvid.contract.options import OPTIONS, Options
from tpuvid.contract.settings import EMBEDDED, SETTINGS
from tpuvid.runs.kept.identity import OPTIONS_OF, VIEWS, RunIdentity

CONFIG = GenerationConfig(height=64, width=64, num_frames=5, fps=8, num_inference_steps=2, guidance_scale=4.0)
RUN = RunIdentity(
    model_id="m", checkpoint="owner/m", fingerprint=None, loras=[], others={}, options=Options(), configs=(CONFIG,)
)  # fmt: skip
CHANGES = {
    "model_id": "n",
    "checkpoint": None,
    "revision": "abc",
    "fingerprint": "f",
    "loras": [{"path": "a", "scale": 1.0, "sha256": "0"}],
    "others": {"taehv": "f"},
    "options": Options(dtype="float32"),
    "configs": (CONFIG, CONFIG),
    "conditioning": "0",
    "metadata": False,
    "prompt_in_metadata": False,
}


def differing(other: RunIdentity) -> set[str]:
    return {kind for kind in VIEWS if other.key(kind) != RUN.key(kind)}


def test_every_field_is_in_a_view():
    assert {f.name for f in fields(RunIdentity)} == set().union(*VIEWS.values()) == set(CHANGES)
    assert set(OPTIONS_OF) == set(VIEWS)


@pytest.mark.parametrize("name", CHANGES)
def test_a_key_is_another_one_for_each_field_of_its_view(name):
    assert differing(replace(RUN, **{name: CHANGES[name]})) == {kind for kind, names in VIEWS.items() if name in names}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_is_in_the_keys_of_what_it_enters(name):
    value = getattr(CONFIG, name)
    other = "other" if SETTINGS[name].kind is str else True if value is False else (value or 0) + 1
    kinds = set(VIEWS) if name in EMBEDDED else set(VIEWS) - {"embeddings"}
    assert differing(replace(RUN, configs=(replace(CONFIG, **{name: other}),))) == kinds


def test_embeddings_of_a_run_without_guidance_are_other_ones():
    assert "embeddings" in differing(replace(RUN, configs=(replace(CONFIG, guidance_scale=1.0),)))


@pytest.mark.parametrize("name", [name for name, each in OPTIONS.items() if each.recorded])
def test_every_recorded_option_is_in_the_keys_of_the_stages_it_enters(name):
    value = True if OPTIONS[name].kind is bool else "dp=2" if name == "mesh" else "other"
    kinds = {kind for kind, stages in OPTIONS_OF.items() if set(stages) & set(OPTIONS[name].enters)}
    found = differing(replace(RUN, options=replace(Options(), **{name: value})))
    assert found == (set() if OPTIONS[name].portable else kinds)


def test_a_runtime_keeps_every_option():
    """What a run is known by is what it was asked for; only what was left open is filled in."""
    given = {"decoder": "taehv", "vae_tiling": True, "lora_path": "a", "lora_scale": 0.5, "warmup_steps": 1, "mesh": "dp=1"}
    asked = Runtime.create(Options(**given, attention_backend="xla", text_encoder_device="cpu", dtype="bfloat16")).asked()
    for name in OPTIONS:
        expected = given.get(name, {"attention_backend": "xla", "text_encoder_device": "cpu", "dtype": "bfloat16"}.get(name))
        found = asked.mesh and str(asked.mesh) if name == "mesh" else getattr(asked, name)
        assert found == (expected if expected is not None else OPTIONS[name].default), name
