"""A denoising run that is stopped and gone on with: the same latents, bit for bit; and several videos in one batch."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tpuvid
from PIL import Image
from shared.pipes import kept
from tpuvid.contract import LoopState
from tpuvid.errors import InputError
from tpuvid.files.stage_files import read_stage_file, write_tensors
from tpuvid.runs.control import Cancelled, CancelToken, Control
from tpuvid.runs.kept.savepoints import Savepoints

PROMPT = "a red circle growing on a black background"
SMALL = dict(num_inference_steps=8, num_frames=5, seed=3)
CACHED = SMALL | dict(cache="deepcache", cache_start_step=2, cache_end_step=7, cache_step_interval=3)  # full: 0-2, 5, 7


@pytest.fixture(scope="module")
def pipe():
    return kept("wan-tiny")


@pytest.fixture(scope="module")
def conditioning(pipe):
    return pipe.encode(PROMPT)


def stop_after(pipe, conditioning, folder, step, settings=SMALL, **control):
    token = CancelToken()

    def on_step(done, total):
        if done == step:
            token.cancel()

    with pytest.raises(Cancelled) as stopped:
        pipe.denoise(conditioning, on_step=on_step, control=Control(cancel=token, savepoint_dir=folder, **control), **settings)
    return stopped.value


def go_on(pipe, conditioning, folder, settings=SMALL):
    """The latents, and the steps that were computed."""
    steps = []
    control = Control(savepoint_dir=folder, resume=True)
    latents = pipe.denoise(conditioning, on_step=lambda done, total: steps.append(done), control=control, **settings)
    return latents, steps


@pytest.mark.parametrize("settings, kept", [(SMALL, [1, 4, 7]), (CACHED, [1, 2, 7])], ids=["full steps", "deepcache"])
def test_a_stopped_run_goes_on_bit_for_bit(pipe, conditioning, tmp_path, settings, kept):
    """With a cache, from the last full step: what the cached ones reuse is computed again."""
    expected = pipe.denoise(conditioning, **settings).latents
    for stopped, step in zip([1, 4, 7], kept, strict=True):
        error = stop_after(pipe, conditioning, tmp_path, stopped, settings)
        assert (error.done, error.total, error.seed) == (stopped, 8, 3) and error.savepoint.exists()
        latents, steps = go_on(pipe, conditioning, tmp_path, settings)
        assert steps == list(range(step + 1, 9))
        assert np.array_equal(latents.latents, expected)
        assert latents.history["denoise"]["resumed"] == f"after step {step}"
        assert list(tmp_path.iterdir()) == [], "savepoints are removed once the result is there"


def test_steps_of_another_attention_are_not_gone_on_with(pipe, conditioning, tmp_path):
    stop_after(pipe, conditioning, tmp_path, 4)
    assert go_on(kept("wan-tiny", attention_backend="xla"), conditioning, tmp_path)[1] == list(range(1, 9))
    assert go_on(pipe, conditioning, tmp_path)[1] == list(range(5, 9))


def test_the_noise_of_a_stochastic_scheduler_goes_on_too(tmp_path):
    from tpuvid_cogvideox.conformance import RandomCogVideoX

    pipe = tpuvid.load(str(RandomCogVideoX(dpm=True).save(tmp_path / "model")))
    conditioning = pipe.encode("a cat")
    settings = dict(height=32, width=48, num_frames=9, num_inference_steps=5, seed=3)
    expected = pipe.denoise(conditioning, **settings).latents
    stop_after(pipe, conditioning, tmp_path / "work", 3, settings)
    latents, steps = go_on(pipe, conditioning, tmp_path / "work", settings)
    assert steps == [4, 5] and np.array_equal(latents.latents, expected)


def test_savepoints_come_every_so_many_steps_and_two_are_kept(pipe, conditioning, tmp_path):
    seen = {}

    def on_step(done, total):
        seen[done] = sorted(int(path.stem[-5:]) for path in tmp_path.glob("denoising-*"))

    control = Control(savepoint_dir=tmp_path, savepoint_every=2)
    pipe.denoise(conditioning, on_step=on_step, control=control, **SMALL)
    assert [seen[step] for step in (1, 2, 3, 5, 7, 8)] == [[], [], [2], [2, 4], [4, 6], [4, 6]]
    assert list(tmp_path.iterdir()) == []


def test_a_savepoint_is_of_one_run_alone(pipe, conditioning, tmp_path):
    """Another seed, other steps, another prompt: each begins at its own first step."""
    stop_after(pipe, conditioning, tmp_path, 4)
    for settings in (SMALL | {"seed": 4}, SMALL | {"num_inference_steps": 9}, SMALL | {"guidance_scale": 2.0}):
        _, steps = go_on(pipe, conditioning, tmp_path, settings)
        assert steps[0] == 1
    other = pipe.encode("a blue square growing on a black background")
    assert go_on(pipe, replace(other, prompt=PROMPT), tmp_path)[1][0] == 1, "embeddings count, not what they are said to be"
    assert go_on(pipe, conditioning, tmp_path)[1][0] == 5


def damage(path, how):
    data = bytearray(path.read_bytes())
    match how:
        case "flipped":
            data[len(data) // 2] ^= 1
        case "truncated":
            data = data[: len(data) // 2]
        case "empty":
            data = b""
        case "step renamed":
            data = data.replace(b'"step":"6"', b'"step":"5"')
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["flipped", "truncated", "empty", "step renamed"])
def test_a_damaged_savepoint_is_refused_and_the_one_before_is_used(pipe, conditioning, tmp_path, how):
    expected = pipe.denoise(conditioning, **SMALL).latents
    stop_after(pipe, conditioning, tmp_path, 7, savepoint_every=2)
    newest, before = sorted(tmp_path.glob("denoising-*"), reverse=True)
    newest.unlink()  # that of step 7; of step 6 it shall be
    stop_after(pipe, conditioning, tmp_path, 6, savepoint_every=2)
    newest, before = sorted(tmp_path.glob("denoising-*"), reverse=True)
    assert newest.stem.endswith("00006") and before.stem.endswith("00004")
    damage(newest, how)
    with pytest.warns(UserWarning, match="00006.safetensors: .*passed over"):
        latents, steps = go_on(pipe, conditioning, tmp_path)
    assert steps[0] == 5 and np.array_equal(latents.latents, expected)


def test_a_whole_file_with_another_runs_content_is_refused(tmp_path):
    state = LoopState(3, np.zeros((1, 1, 2), np.float32), np.zeros((1, 8), np.uint8))
    run = Savepoints(tmp_path, {"seed": 1})
    path = run.save(state)
    assert run.latest(8).step == 3 and run.latest(3) is None, "no step is left"
    file = read_stage_file(path)
    metadata = {key: value for key, value in file.metadata.items() if key != "checksum"}
    write_tensors(path, file.tensors, metadata | {"run": "another"}, overwrite=True)
    with pytest.warns(UserWarning, match="is no savepoint of this run"):
        assert run.latest(8) is None


def test_a_state_of_another_shape_is_refused(pipe, conditioning, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Savepoints, "latest", lambda self, steps: LoopState(2, np.zeros((1, 2), np.float32), np.zeros((1, 8), np.uint8))
    )
    with pytest.raises(InputError, match="is not of this run"):
        go_on(pipe, conditioning, tmp_path)


def test_cancelling_without_a_place_keeps_nothing(pipe, conditioning):
    token = CancelToken()
    with pytest.raises(Cancelled, match="^stopped after step 1 of 8$") as stopped:
        pipe.denoise(conditioning, on_step=lambda *_: token.cancel(), control=Control(cancel=token), **SMALL)
    assert stopped.value.savepoint is None and not token.in_loop


def test_what_is_cancelled_before_it_begins_does_not_begin(pipe, conditioning, monkeypatch):
    token = CancelToken()
    token.cancel()
    with pytest.raises(Cancelled, match="after step 0 of 8"):
        pipe.denoise(conditioning, control=Control(cancel=token), **SMALL)


def test_a_video_cancelled_at_the_last_step_is_not_decoded(pipe, monkeypatch):
    token = CancelToken()
    monkeypatch.setattr(type(pipe), "decode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(Cancelled, match="after step 8 of 8"):
        pipe.generate(
            PROMPT, on_step=lambda done, total: done == total and token.cancel(), control=Control(cancel=token), **SMALL
        )


def test_savepoints_of_a_run_that_was_not_gone_on_with_do_not_crowd_out_new_ones(pipe, conditioning, tmp_path):
    stop_after(pipe, conditioning, tmp_path, 7, savepoint_every=3)
    for path in tmp_path.glob("denoising-*"):
        damage(path, "flipped")
    error = stop_after(pipe, conditioning, tmp_path, 2)
    assert error.savepoint.exists()
    with pytest.warns(UserWarning, match="passed over"):
        assert go_on(pipe, conditioning, tmp_path)[1][0] == 3


def test_a_batch_needs_one_of_each(pipe, conditioning):
    config = pipe.spec.configure(prompt=PROMPT, num_inference_steps=2, num_frames=5)
    for conditionings, configs in (([], []), ([conditioning], [config, config])):
        with pytest.raises(InputError, match="needs one of each"):
            pipe.denoise_batch(conditionings, configs)
    with pytest.raises(InputError, match="are not of the prompt 'a cat'"):
        pipe.denoise_batch([conditioning], [replace(config, prompt="a cat")])


def test_steps_that_a_scheduler_can_not_make_are_refused_first(pipe, forbid_weights):
    forbid_weights()
    with pytest.raises(InputError, match="UniPCMultistepScheduler can't make 900 steps; use fewer"):
        pipe.generate(PROMPT, num_frames=5, num_inference_steps=900)


def test_cancelling_at_the_last_step_is_too_late(pipe, conditioning):
    token = CancelToken()
    latents = pipe.denoise(
        conditioning, on_step=lambda done, total: done == total and token.cancel(), control=Control(cancel=token), **SMALL
    )
    assert np.isfinite(latents.latents).all()


@pytest.mark.parametrize(
    "control, says",
    [
        (dict(savepoint_every=0, savepoint_dir=Path("x")), "savepoint_every=0"),
        (dict(savepoint_every=2), "needs savepoint_dir"),
        (dict(resume=True), "resume: needs savepoint_dir"),
        (dict(preview_every=0), "preview_every=0"),
    ],
)
def test_controls_that_make_no_sense_are_refused(control, says):
    with pytest.raises(InputError, match=says):
        Control(**control)


def test_videos_of_a_batch_are_those_made_alone(pipe):
    prompts = [PROMPT, "a blue square moving up on a white background"]
    configs = [
        pipe.spec.configure(prompt=p, seed=s, num_inference_steps=4, num_frames=5) for p, s in zip(prompts, (1, 2), strict=True)
    ]
    conditionings = [pipe.encode_config(config) for config in configs]
    together = pipe.denoise_batch(conditionings, configs)
    for conditioning, config, found in zip(conditionings, configs, together, strict=True):
        alone = pipe.denoise_config(conditioning, config)
        np.testing.assert_allclose(found.latents, alone.latents, rtol=0, atol=1e-5)
        assert found.config == alone.config and found.history["denoise"]["batch_size"] == 2
    with pytest.raises(InputError, match="differ in more than prompts and seeds"):
        pipe.denoise_batch(conditionings, [configs[0], replace(configs[1], num_frames=9)])


def test_a_stopped_batch_goes_on_bit_for_bit(pipe, tmp_path):
    configs = [pipe.spec.configure(prompt=PROMPT, seed=seed, num_inference_steps=4, num_frames=5) for seed in (1, 2)]
    conditionings = [pipe.encode_config(config) for config in configs]
    expected = pipe.denoise_batch(conditionings, configs)
    token = CancelToken()
    control = Control(cancel=token, savepoint_dir=tmp_path)
    with pytest.raises(Cancelled):
        pipe.denoise_batch(conditionings, configs, on_step=lambda d, n: d == 2 and token.cancel(), control=control)
    found = pipe.denoise_batch(conditionings, configs, control=Control(savepoint_dir=tmp_path, resume=True))
    assert all(np.array_equal(a.latents, b.latents) for a, b in zip(expected, found, strict=True))


def few_clips(monkeypatch, tmp_path):
    """A map fitted to two clips is as good as any where nobody looks at its colours, and quickly there."""
    monkeypatch.setenv("TPUVID_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("tpuvid.runs.preview.CLIPS", 2)


def test_previews_are_pictures_of_what_is_coming(pipe, conditioning, tmp_path, monkeypatch):
    """Every third step, and the last, which shows the result."""
    from tpuvid.runs.preview import Preview

    few_clips(monkeypatch, tmp_path)
    shown = []
    monkeypatch.setattr(Preview, "show_soon", lambda self, latents: shown.append(latents()))
    control = Control(preview=tmp_path / "p.png", preview_every=3)
    result = pipe.denoise(conditioning, control=control, **SMALL).latents
    assert len(shown) == 3 and np.array_equal(shown[-1], result), "after steps 3, 6 and 8"
    assert all(estimate.shape == result.shape and np.isfinite(estimate).all() for estimate in shown)


def test_a_preview_is_an_animated_png(pipe, conditioning, tmp_path, monkeypatch):
    few_clips(monkeypatch, tmp_path)
    monkeypatch.setattr(pipe, "spec", replace(pipe.spec, preview=None))  # of a model whose package brings no map
    before = pipe.denoise(conditioning, **SMALL).latents
    control = Control(preview=tmp_path / "p.png")
    assert np.array_equal(pipe.denoise(conditioning, control=control, **SMALL).latents, before)
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.n_frames == 2 and min(picture.size) >= 200, "of 5 frames, two latent ones"
    (kept,) = (tmp_path / "cache" / "preview").iterdir()
    kept.write_text("{}")
    with pytest.raises(InputError, match="is damaged; remove it"):
        pipe.denoise(conditioning, control=control, **SMALL)


@pytest.mark.parametrize("family", ["cogvideox", "hunyuan"])
def test_other_families_have_previews_too(family, tmp_path, monkeypatch):
    """Latents that lie otherwise while they are denoised; VAEs that compress otherwise."""
    from tpuvid_cogvideox.conformance import RandomCogVideoX
    from tpuvid_hunyuan.conformance import RandomHunyuan

    few_clips(monkeypatch, tmp_path)
    checkpoint = {"cogvideox": RandomCogVideoX(), "hunyuan": RandomHunyuan()}[family]
    pipe = tpuvid.load(str(checkpoint.save(tmp_path / "model")))
    size = {"cogvideox": dict(height=32, width=48), "hunyuan": dict(height=64, width=96)}[family]
    control = Control(preview=tmp_path / "p.png", preview_every=2)
    pipe.denoise(pipe.encode("a cat"), control=control, num_frames=9, num_inference_steps=2, **size)
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.n_frames == 3 and picture.size == (258, 172)
