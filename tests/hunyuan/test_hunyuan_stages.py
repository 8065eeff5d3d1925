import json
import shutil
from dataclasses import replace

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import tpuvid
from diffusers import AutoencoderKLHunyuanVideo15, HunyuanVideo15Pipeline
from diffusers.pipelines.hunyuan_video1_5.image_processor import HunyuanVideo15ImageProcessor
from hunyuan.conftest import SMALL
from safetensors.numpy import save_file
from shared.decoding import chunks_of
from tpuvid import InputError
from tpuvid.cli.main import run
from tpuvid.compute.kernels import attention
from tpuvid.family import Runtime
from tpuvid.files.stage_files import load_conditioning
from tpuvid.plugin.lookup import resolve_model
from tpuvid.plugin.registry import registry
from tpuvid_hunyuan import encode
from tpuvid_hunyuan.denoise import HunyuanDenoiser
from tpuvid_hunyuan.plugin import HUNYUAN_480P, HUNYUAN_720P

QUOTED = 'a sign that says "OPEN"'
SCALES = np.full(3, 4.0, np.float32)  # guidance is on: two prompts in every batch
TIMES = np.full(2, 500, np.float32)


@pytest.mark.parametrize("spec", [HUNYUAN_720P, HUNYUAN_480P], ids=lambda spec: spec.model_id)
def test_siblings_are_told_apart_and_have_the_stock_size(spec):
    config = {"num_layers": 54, "target_size": spec.signature["target_size"], "num_attention_heads": 16}
    assert registry().match("HunyuanVideo15Pipeline", config) == spec
    size = HunyuanVideo15ImageProcessor(vae_scale_factor=16).calculate_default_height_width(9, 16, config["target_size"])
    assert (spec.defaults.height, spec.defaults.width) == size


def test_template_is_the_pipelines(checkpoint):
    stock = HunyuanVideo15Pipeline.from_pretrained(checkpoint)
    assert encode.SYSTEM_MESSAGE == stock.system_message
    assert encode.TEMPLATE_TOKENS == stock.prompt_template_encode_start_idx == 108
    assert encode.GLYPH_TOKENS == stock.tokenizer_2_max_length == 256
    assert encode.SKIPPED_LAYERS == 2


def test_embeddings_have_the_names_and_shapes_of_earlier_tools(pipe):
    tensors = pipe.encode(QUOTED, "").tensors
    shapes = {"embeds": (1, 1000, 32), "embeds_mask": (1, 1000), "embeds_2": (1, 256, 24), "embeds_mask_2": (1, 256)}
    assert {name: t.shape for name, t in tensors.items()} == {
        f"{sign}prompt_{name}": shape for sign in ("", "negative_") for name, shape in shapes.items()
    }
    assert all(t.dtype == np.int32 for name, t in tensors.items() if "mask" in name)
    assert tensors["prompt_embeds_mask_2"].sum() == len('Text "OPEN". ') + 1
    assert not tensors["negative_prompt_embeds_2"].any() and not tensors["negative_prompt_embeds_mask_2"].any()
    ending = len("\nassistant\n") + 2  # im_end and im_start
    assert tensors["prompt_embeds_mask"].sum() == len(QUOTED) + ending
    assert tensors["negative_prompt_embeds_mask"].sum() == 1 + ending, "an empty prompt is a space"


def test_byt5_runs_for_quoted_text_alone(checkpoint, monkeypatch):
    pipe = tpuvid.load(str(checkpoint))

    def unused(*args):
        raise AssertionError("byT5 ran")

    monkeypatch.setattr("tpuvid_hunyuan.encode.HunyuanTextEncoder._embed_glyphs", unused)
    pipe.encode("a cat", "“")
    with pytest.raises(AssertionError, match="byT5 ran"):
        pipe.encode("a “cat”")


def test_the_text_models_end_is_neither_loaded_nor_run(checkpoint, pipe):
    pipe.encode("a cat")
    params = pipe._opened["encode"].text.params
    assert params["layers.*.mlp.up_proj.weight"].shape[0] == 2, "of four"
    assert not any(name.startswith("norm") for name in params)
    folder = checkpoint / "text_encoder" / "config.json"
    assert json.loads(folder.read_text())["num_hidden_layers"] == 4


def test_padding_has_no_influence(pipe):
    """Whatever stands in the embeddings of padding, the latents are the same bit for bit."""
    conditioning = pipe.encode(QUOTED, "dog", max_sequence_length=60)
    expected = pipe.denoise(conditioning, **SMALL).latents
    wild = {}
    for name, tensor in conditioning.tensors.items():
        if "mask" not in name:
            mask = conditioning.tensors[name.replace("embeds", "embeds_mask")]
            noise = 1e4 * np.random.default_rng(0).standard_normal(tensor.shape).astype(np.float32)
            noise[..., 0] = np.nan
            wild[name] = np.where(mask[..., None] > 0, tensor, noise)
            assert (wild[name] != tensor).any()
    found = pipe.denoise(replace(conditioning, tensors=conditioning.tensors | wild), **SMALL).latents
    np.testing.assert_array_equal(found, expected)
    # nor where the transformer itself is given it
    denoiser = pipe._opened["denoise"]
    inputs = denoiser._inputs(conditioning.tensors, (2, 2, 3), SCALES)
    poisoned = inputs._replace(
        text=np.where(inputs.text_mask[..., None], inputs.text, 1e4),
        glyphs=np.where(inputs.glyph_mask[..., None], inputs.glyphs, -1e4),
    )
    latents = np.random.default_rng(1).standard_normal((2, 4, 2, 2, 3), np.float32)
    a, b = (jax.jit(denoiser._predict)(denoiser.params, latents, TIMES, i) for i in (inputs, poisoned))
    np.testing.assert_array_equal(a, b)


def test_both_text_streams_are_heard(pipe):
    """Other words, quoted or not, change the latents by more than any tolerance here."""
    base = pipe.denoise(pipe.encode(QUOTED), **SMALL).latents
    conditioning = pipe.encode(QUOTED)
    other = pipe.encode("the moon “shut”").tensors
    for stream in ("", "_2"):
        names = [f"prompt_embeds{stream}", f"prompt_embeds_mask{stream}"]
        mixed = replace(conditioning, tensors=conditioning.tensors | {name: other[name] for name in names})
        found = pipe.denoise(mixed, **SMALL).latents
        assert np.abs(found - base).max() > 1e-2 * np.abs(base).max(), stream


def test_a_stream_without_tokens_gives_no_nan(pipe):
    """No quotes: every glyph is masked. Also where the prompt's mask is empty, which `check` refuses before."""
    conditioning = pipe.encode("a cat")
    pipe.denoise(conditioning, **SMALL)
    denoiser = pipe._opened["denoise"]
    inputs = denoiser._inputs(conditioning.tensors, (2, 2, 3), SCALES)
    inputs = inputs._replace(text_mask=np.zeros_like(inputs.text_mask))
    latents = np.random.default_rng(1).standard_normal((2, 4, 2, 2, 3), np.float32)
    found = jax.jit(denoiser._predict)(denoiser.params, latents, TIMES, inputs)
    assert np.isfinite(found).all()


def test_every_mask_is_over_keys_alone(pipe, monkeypatch):
    """What kernels on TPU and GPU take; a mask of all pairs of tokens would fill the memory."""
    conditioning = pipe.encode("a cat", max_sequence_length=61)
    latents = pipe.denoise(conditioning, **SMALL)
    pipe.decode(latents)
    shapes = []

    def recorded(query, key, value, *, mask=None, **how):
        shapes.append((mask.dtype, query.shape[2], mask.shape))
        return attention(query, key, value, mask=mask, **how)

    for module in ("operators", "kernels.tokens"):
        monkeypatch.setattr(f"tpuvid.compute.{module}.attention", recorded)
    denoiser, decoder = pipe._opened["denoise"], pipe._opened["decode"]
    inputs = denoiser._inputs(conditioning.tensors, (2, 2, 3), SCALES)
    jax.eval_shape(denoiser._predict, denoiser.params, np.zeros((2, *latents.latents.shape[1:]), np.float32), TIMES, inputs)
    tokens = 2 * 2 * 3 + 61 + 256
    assert shapes == 2 * [(bool, 61, (2, 1, 1, 61))] + [(bool, tokens, (2, 1, 1, tokens))], "two refiner blocks, one scan"
    shapes.clear()
    jax.eval_shape(decoder._middle, decoder.params, np.zeros((1, 4, 3, 7, 11), np.float32))
    assert shapes == [(bool, 77, (1, 1, 1, 3 * 77))], "one frame's queries"


def test_guidance_off_ignores_the_negative_prompt(pipe):
    config = SMALL | {"guidance_scale": 1.0}
    a, b = (pipe.denoise(pipe.encode("a cat", negative), **config).latents for negative in ("", "moon moon"))
    assert np.array_equal(a, b)
    c = pipe.denoise(pipe.encode("a cat", "moon moon"), **SMALL).latents
    assert not np.array_equal(a, c)


@pytest.mark.parametrize("frames", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow), 13])
def test_every_number_of_latent_frames_decodes_as_in_diffusers(checkpoint, pipe, frames):
    torch.manual_seed(0)
    z = torch.randn(1, 4, frames, 3, 5)
    vae = AutoencoderKLHunyuanVideo15.from_pretrained(checkpoint, subfolder="vae")
    with torch.no_grad():
        expected = (vae.decode(z / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1).numpy()
    chunks = chunks_of(pipe, z)
    assert [c.shape[1] for c in chunks] == {1: [1], 2: [1, 4], 5: [1, 16], 13: [1, 24, 24]}[frames]
    np.testing.assert_allclose(np.concatenate(chunks, axis=1), expected, atol=1e-4)


def test_bfloat16_is_close(checkpoint, pipe):
    half = tpuvid.load(str(checkpoint), dtype="bfloat16")
    conditioning = half.encode(QUOTED)
    assert {t.dtype for name, t in conditioning.tensors.items() if "mask" not in name} == {np.dtype(ml_dtypes.bfloat16)}
    latents = half.denoise(conditioning, **SMALL)
    assert latents.latents.dtype == np.float32
    expected = pipe.denoise(pipe.encode(QUOTED), **SMALL)
    assert np.abs(latents.latents - expected.latents).max() < 0.1 * np.abs(expected.latents).max()
    frames = half.decode(expected).frames
    assert frames.dtype == np.float32 and np.abs(frames - pipe.decode(expected).frames).max() < 0.1


@pytest.fixture(scope="module")
def made(pipe):
    """Embeddings and latents."""
    conditioning = pipe.encode("a cat")
    return conditioning, pipe.denoise(conditioning, **SMALL)


@pytest.fixture
def unreadable(checkpoint, made, forbid_weights):
    """A pipeline whose weights can't be read: every error must come first. With embeddings and latents made before."""
    forbid_weights()
    return tpuvid.load(str(checkpoint)), *made


def test_inputs_are_refused_before_weights_are_read(checkpoint, tmp_path, unreadable):
    pipe, conditioning, latents = unreadable
    with pytest.raises(InputError, match="made by wan2.1-t2v-14b, which is another checkpoint"):
        pipe.denoise(replace(conditioning, model_id="wan2.1-t2v-14b", fingerprint=None), **SMALL)
    with pytest.raises(InputError, match="num_frames=8: needs 4n.1 frames up to 4093; nearest: 5 and 9"):
        pipe.denoise(conditioning, **SMALL | {"num_frames": 8})
    with pytest.raises(InputError, match="height=40: needs a multiple of 16"):
        pipe.denoise(conditioning, **SMALL | {"height": 40})
    with pytest.raises(InputError, match=r"takes \[B, 4, f, h, w\]"):
        pipe.decode(replace(latents, tensors={"latents": np.zeros((1, 16, 3, 4, 6), np.float32)}))
    lora = tmp_path / "lora.safetensors"
    save_file({"a": np.zeros(1, np.float32)}, lora)
    with pytest.raises(InputError, match="merges no LoRA files"):
        tpuvid.load(str(checkpoint), lora_path=lora).denoise(conditioning, **SMALL)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("prompt_embeds", lambda t: np.zeros((1, 226, 4096), np.float32), r"takes \[1, L, 32\]"),
        ("prompt_embeds", lambda t: t.astype(np.int32), "prompt_embeds is int32"),
        ("prompt_embeds_2", lambda t: None, "prompt_embeds_2 is missing; encode with this model"),
        ("prompt_embeds_mask", lambda t: None, "prompt_embeds_mask is missing"),
        ("prompt_embeds_mask", lambda t: t[:, :7], r"prompt_embeds_mask is \[1, 7\], not \[1, 1000\]"),
        ("prompt_embeds_mask", lambda t: 0 * t, "prompt_embeds_mask keeps no token"),
        ("prompt_embeds_mask_2", lambda t: t - 1, "prompt_embeds_mask_2 holds other values than 0 and 1"),
        ("prompt_embeds", lambda t: t * np.inf, "prompt_embeds holds NaN or infinity"),
        ("negative_prompt_embeds", lambda t: t[:, :7], "both prompts' alike"),
        ("negative_prompt_embeds_mask_2", lambda t: None, "negative_prompt_embeds_mask_2 is missing"),
        ("negative_prompt_embeds_2", lambda t: t[..., :3], r"negative_prompt_embeds_2 is float32 .* takes \[1, L, 24\]"),
    ],
)
def test_embeddings_of_another_model_are_refused(unreadable, name, change, message):
    pipe, conditioning, _ = unreadable
    tensors = conditioning.tensors | {name: change(conditioning.tensors[name])}
    with pytest.raises(InputError, match=message):
        pipe.denoise(replace(conditioning, tensors={k: t for k, t in tensors.items() if t is not None}), **SMALL)


def test_files_of_earlier_tools_are_taken(pipe, tmp_path):
    """Their masks are floating point, their bfloat16 is stored as float32, and they may lack the negative prompt."""
    conditioning = pipe.encode("a cat", max_sequence_length=40)
    tensors = {
        name: t.astype(np.float32).astype(ml_dtypes.bfloat16) if "mask" in name else t
        for name, t in conditioning.tensors.items()
        if not name.startswith("negative_")
    }
    path = tmp_path / "stage1_embeddings.safetensors"
    stored = {name: t.astype(np.float32) for name, t in tensors.items()}
    save_file(stored, path, {"dtype_info": json.dumps({name: t.dtype.name for name, t in tensors.items()}), "prompt": "a cat"})
    settings = SMALL | {"guidance_scale": 1.0}
    found = pipe.denoise(load_conditioning(path), **settings).latents
    np.testing.assert_array_equal(found, pipe.denoise(conditioning, **settings).latents)


@pytest.mark.parametrize(
    "file, change, message",
    [
        ("scheduler/scheduler_config.json", {"_class_name": "HeunDiscreteScheduler"}, "HeunDiscreteScheduler"),
        ("guider/guider_config.json", {"_class_name": "SkipLayerGuidance"}, "SkipLayerGuidance"),
        ("transformer/config.json", {"use_meanflow": True}, "use_meanflow=True"),
        ("transformer/config.json", {"patch_size": 2}, r"patch_size=\(1, 2\)"),
        ("transformer/config.json", {"in_channels": 33}, "in_channels=33: needs 9"),
        ("text_encoder/config.json", {"layer_types": ["sliding_attention"] * 4}, "full_attention"),
        ("vae/config.json", {"latent_channels": 8}, "download the component again"),
    ],
)
def test_checkpoints_that_cannot_run_are_refused(checkpoint, tmp_path, file, change, message):
    path = _copy(checkpoint, tmp_path) / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message):
        tpuvid.load(str(tmp_path / "copy")).generate("a cat", **SMALL)


@pytest.mark.parametrize("component", ["tokenizer_2", "guider", "text_encoder_2"])
def test_missing_parts_are_named(checkpoint, tmp_path, component):
    shutil.rmtree(_copy(checkpoint, tmp_path) / component)
    with pytest.raises(InputError, match=f"no '{component}' folder"):
        tpuvid.load(str(tmp_path / "copy")).generate("a cat", **SMALL)


def test_a_scale_that_the_guider_cannot_take_is_refused_first(checkpoint, tmp_path, forbid_weights, capsys):
    folder = _copy(checkpoint, tmp_path)
    path = folder / "guider" / "guider_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"enabled": False}))
    forbid_weights()
    with pytest.raises(InputError, match="guidance_scale=3.0: this checkpoint's guider is switched off"):
        tpuvid.load(str(folder)).generate("a cat", **SMALL)
    sampling = ["--height", "32", "--width", "48", "--num-frames", "5", "--guidance-scale", "3"]
    assert run(["generate", "--model", str(folder), "--prompt", "a cat", *sampling, "-o", str(tmp_path / "a.mp4")]) == 2
    assert "guider is switched off" in capsys.readouterr().err


def test_tokenizers_of_other_models_are_refused(checkpoint, tmp_path, forbid_weights):
    """What they would give is nonsense, or words that the text encoder has no embedding of."""
    forbid_weights()
    plain = _copy(checkpoint, tmp_path)
    (plain / "tokenizer" / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="tokenizer: has no chat template"):
        tpuvid.load(str(plain)).generate("a cat", **SMALL)
    other = shutil.copytree(checkpoint, tmp_path / "other")
    shutil.rmtree(other / "tokenizer_2")
    shutil.copytree(checkpoint / "tokenizer", other / "tokenizer_2")
    with pytest.raises(InputError, match="tokenizer_2: is a Qwen2Tokenizer.*, not the ByT5Tokenizer"):
        tpuvid.load(str(other)).generate("a cat", **SMALL)
    small = shutil.copytree(checkpoint, tmp_path / "small")
    config = small / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 9}))
    with pytest.raises(InputError, match=r"tokenizer has \d+ words, text_encoder embeds 9: they are of two models"):
        tpuvid.load(str(small)).generate("a cat", **SMALL)


def _copy(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copy")


def test_stages_open_without_weights_of_others(checkpoint):
    """Each takes its own components; the denoiser's parameters are those of the checkpoint, less the image half."""
    checkpoint = resolve_model(str(checkpoint))[1]
    denoiser = HunyuanDenoiser(checkpoint, Runtime.create())
    denoiser.verify()
    assert not any("image_embedder" in name for name in denoiser.traced.parameters(np.dtype(np.float32)))
    assert any("image_embedder" in name for name in checkpoint.weights("transformer"))
