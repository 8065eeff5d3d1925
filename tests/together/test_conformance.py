"""The conformance suite finds what it is for: each check against a fault planted into Wan."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tpuvid_wan.decode
import tpuvid_wan.denoise
import tpuvid_wan.encode
from tpuvid import testing
from tpuvid.cli.main import run
from tpuvid.contract import Conformance
from tpuvid.errors import InputError
from tpuvid.family import Sampler
from tpuvid.plugin.loader import Plugin
from tpuvid.plugin.registry import Registry, registry
from tpuvid.testing import runner, suite
from tpuvid.testing.sheet import Result, Sheet
from tpuvid.testing.subject import Subject
from tpuvid_wan.conformance import RandomWan
from tpuvid_wan.denoise import WanDenoiser
from tpuvid_wan.plugin import WAN_1_3B, WAN_14B


def one_block(folder):
    RandomWan(layers=2, vae_dim=4).save(folder)


SPEC = replace(
    registry().get(WAN_14B.model_id),
    conformance=Conformance(
        random_checkpoint=f"{__name__}:one_block",
        settings=dict(
            height=16, width=16, num_frames=5, num_inference_steps=3, guidance_scale=3.0, seed=7, max_sequence_length=50
        ),
        reference="tpuvid_wan.conformance:reference",
    ),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conformance") / "random"
    one_block(folder)
    return folder


@pytest.fixture
def subject(checkpoint, tmp_path):
    return Subject([SPEC], checkpoint, tmp_path)


def deaf(monkeypatch, subject):
    """The prompt plays no part."""
    embed = tpuvid_wan.encode.WanTextEncoder.embed
    monkeypatch.setattr(tpuvid_wan.encode.WanTextEncoder, "embed", lambda self, *args: 0 * embed(self, *args) + 1)


def seedless(monkeypatch, subject):
    made = tpuvid_wan.denoise.make_generators
    monkeypatch.setattr(tpuvid_wan.denoise, "make_generators", lambda seeds: made([0] * len(seeds)))


def forgetful(monkeypatch, subject):
    """What comes out depends on what has run before, as with a state that a stage keeps."""
    calls, denoise = [], WanDenoiser.denoise

    def forget(*args):
        calls.append(1)
        return {"latents": denoise(*args)["latents"] + 0.01 * len(calls)}

    monkeypatch.setattr(WanDenoiser, "denoise", forget)


def one_noise_for_all(monkeypatch, subject):
    made = tpuvid_wan.denoise.make_noise
    monkeypatch.setattr(tpuvid_wan.denoise, "make_noise", lambda shape, g: np.repeat(made(shape, g)[:1], len(g), axis=0))


def begins_anew(monkeypatch, subject):
    begin = Sampler._begin
    monkeypatch.setattr(Sampler, "_begin", lambda self, *args: begin(self, *args[:-1], None))


def other_state(monkeypatch, subject):
    begin = Sampler._begin
    monkeypatch.setattr(
        Sampler, "_begin", lambda self, *args: (lambda step, state: (step, state * (1 + 0.01 * step)))(*begin(self, *args))
    )


def unchecked(monkeypatch, subject):
    """Weights are read before anybody looks at the inputs, which then break the program."""
    monkeypatch.setattr(WanDenoiser, "check", lambda *_: None)


def unverified(monkeypatch, subject):
    monkeypatch.setattr(WanDenoiser, "verify", lambda self: None)


def too_bright(monkeypatch, subject):
    to_frames = tpuvid_wan.decode.WanDecoder.to_frames
    monkeypatch.setattr(tpuvid_wan.decode.WanDecoder, "to_frames", lambda *args: to_frames(*args) * 2)


def a_frame_less(monkeypatch, subject):
    drawn = tpuvid_wan.decode.WanDecoder._frames
    monkeypatch.setattr(tpuvid_wan.decode.WanDecoder, "_frames", lambda *args: (frames[:, :-1] for frames in drawn(*args)))


def other_guidance(monkeypatch, subject):
    """A slip of 1%: noise of its own is some 1e-6."""
    made = tpuvid_wan.denoise.guidance_scales
    monkeypatch.setattr(tpuvid_wan.denoise, "guidance_scales", lambda config: 1.01 * made(config))


def blind_window(monkeypatch, subject):
    monkeypatch.setattr(Sampler, "window", lambda *_, **__: None)


def other_on_eight(monkeypatch, subject):
    """A layout that changes the latents by 1%."""
    own = subject.pipeline

    def larger(found):
        return replace(found, tensors={"latents": 1.01 * found.latents})

    def pipeline(folder=None, *, devices=1, mesh=None):
        pipe = own(folder)
        if devices == 8:
            denoise = pipe.denoise
            pipe.denoise = lambda *args, **how: larger(denoise(*args, **how))
        return pipe

    subject.pipeline = pipeline


def taken_name(monkeypatch, subject):
    index = json.loads((subject.checkpoint / "model_index.json").read_text())
    subject.checkpoint = subject.scratch / "other"
    RandomWan().save(subject.checkpoint)
    (subject.checkpoint / "model_index.json").write_text(json.dumps(index | {"_class_name": "CogVideoXPipeline"}))


def lax_rules(monkeypatch, subject):
    """They accept what the model can't make."""
    rules = replace(SPEC.rules, frame_step=1)
    subject.specs = [replace(SPEC, rules=rules)]


def deaf_to_shift(monkeypatch, subject):
    made = tpuvid_wan.denoise.make_schedule
    monkeypatch.setattr(tpuvid_wan.denoise, "make_schedule", lambda config, steps, shift: made(config, steps, 3.0))


def unfinished(monkeypatch, subject):
    monkeypatch.delattr(WanDenoiser, "resolve")


def other_settings(monkeypatch, subject):
    subject.specs = [replace(SPEC, conformance=replace(SPEC.conformance, settings={"hight": 16}))]


def odd_reference(monkeypatch, subject):
    monkeypatch.setattr("tpuvid_wan.conformance.reference", lambda *_: {"latents": 0, "frames": 0, "nonsense": 0})


def undefined_on_eight(monkeypatch, subject):
    """Python's own max() of 0 and NaN is 0."""
    monkeypatch.setattr(suite, "_error", lambda found, expected: float("nan") if found.ndim == 3 else 0.0)


def missing_configs(monkeypatch, subject):
    subject.specs = [replace(SPEC, configs="tpuvid_wan:nowhere")]


def missing_loader(monkeypatch, subject):
    subject.specs = [replace(SPEC, load_decoder="tpuvid_wan.decode:Nothing")]


def no_refusal(monkeypatch, subject):
    subject.specs = [
        replace(SPEC, takes=("flow_shift", "cache", "window_size"), rules=replace(SPEC.rules, max_size=10**9, size_multiple=1))
    ]
    monkeypatch.setattr("tpuvid.contract.models.check_sampling", lambda config: None)


@pytest.mark.parametrize(
    "check, fault, said",
    [
        (suite.check_spec, missing_configs, "nowhere"),
        (suite.check_spec, missing_loader, "Nothing"),
        (suite.check_spec, no_refusal, "was accepted"),
        (suite.check_spec, unfinished, "WanDenoiser has no resolve"),
        (suite.check_spec, other_settings, "hight: no such setting"),
        (suite.check_settings, deaf_to_shift, "flow_shift=2.0 and flow_shift=9.0 give the same latents"),
        (suite.check_parity, odd_reference, "gives nonsense, which is none of"),
        (suite.check_mesh, undefined_on_eight, "nan of the largest value"),
        (suite.check_found, taken_name, "CogVideoX"),
        (suite.check_shapes, too_bright, "not float32 in"),
        (suite.check_shapes, a_frame_less, "frames are"),
        (suite.check_bad_input, unchecked, "another width was accepted|was read before"),
        (suite.check_bad_input, unverified, "of the transformer|was read before"),
        (suite.check_rules, lax_rules, "frames are"),
        (suite.check_determinism, deaf, "prompt=.* gave the same video"),
        (suite.check_determinism, seedless, "seed=8 gave the same video"),
        (suite.check_determinism, forgetful, "same request gave another video"),
        (suite.check_staged, forgetful, "staged and one-shot videos differ"),
        (suite.check_batch, one_noise_for_all, "in a batch of two"),
        (suite.check_resume, begins_anew, "began anew"),
        (suite.check_resume, other_state, "gave other latents"),
        (suite.check_window, blind_window, "over one frame changes nothing"),
        (suite.check_parity, other_guidance, "latents differ by"),
        (suite.check_mesh, other_on_eight, "of the largest value"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_planted_fault_is_found(subject, monkeypatch, check, fault, said):
    fault(monkeypatch, subject)
    with pytest.raises((AssertionError, InputError, AttributeError), match=said):
        check(subject)


@pytest.mark.slow
def test_without_a_fault_they_pass(subject):
    """As those of our own packages do; the mesh has a process of its own there."""
    for check in suite.SUITE:
        if check not in (suite.check_mesh, suite.check_decoders, suite.check_light):
            assert check(subject)


def test_errors_of_a_plugin_are_a_row_with_its_place(subject, monkeypatch):
    def broken(subject):
        raise KeyError("missing")

    row = suite._result(broken, subject)
    assert row["passed"] is False and "KeyError: 'missing'" in row["detail"] and "test_conformance.py:" in row["detail"]


def test_what_is_not_installed_is_refused(capsys, tmp_path):
    assert run(["plugin", "check", "tpuvid-nothing"]) == 2
    error = capsys.readouterr().err
    assert "'tpuvid-nothing' is not installed" in error and "tpuvid-wan (wan2.1-t2v-14b, wan2.1-t2v-1.3b)" in error
    assert run(["plugin", "check", "tpuvid-wan", "--checkpoint", str(tmp_path / "nowhere")]) == 2
    assert "nowhere: is no folder" in capsys.readouterr().err


def test_a_plugin_that_does_not_load_fails(monkeypatch, capsys):
    broken = Plugin("zoo", "tpuvid-zoo", "1.0", "zoo", error="ImportError: no giraffe")
    monkeypatch.setattr(runner, "registry", lambda: Registry((broken,)))
    assert run(["plugin", "check", "zoo"]) == 1
    out = capsys.readouterr().out
    assert (
        "zoo (tpuvid-zoo 1.0)" in out and "FAIL  loads" in out and "no giraffe" in out and "does not conform (1 failed)" in out
    )
    assert run(["plugin", "check", "zoo", "--json"]) == 1
    (sheet,) = json.loads(capsys.readouterr().out)
    assert sheet["passed"] is False and sheet["results"][0]["check"] == "loads"


def test_models_of_the_same_code_are_one_sheet(monkeypatch):
    other = replace(WAN_1_3B, model_id="other", load_decoder="elsewhere:Decoder")
    plugin = Plugin("wan", "tpuvid-wan", "1", "tpuvid_wan.plugin", models=(WAN_14B, WAN_1_3B, other))
    monkeypatch.setattr(runner, "registry", lambda: Registry((plugin,)))
    monkeypatch.setattr(runner, "_in_a_process", lambda ids, checkpoint: iter([Result("spec", True, " ".join(ids))]))
    assert [sheet.results[0].detail for sheet in testing.check("tpuvid_wan")] == ["wan2.1-t2v-14b wan2.1-t2v-1.3b", "other"]
    assert [sheet.results[0].detail for sheet in testing.check("other")] == ["other"]
    assert Sheet("x", [Result("a", None, "")]).passed and not Sheet("x", [Result("a", False, "")]).passed
