"""Checkpoints as published, at full size: every weight is matched, or an error names what is missing or left over.

The files are real safetensors with real headers and holes in the place of the data: 28 GB that take a few MB of disk.
"""

import json
import struct
from pathlib import Path

import diffusers
import pytest
import torch
from accelerate import init_empty_weights
from tpuvid import InputError
from tpuvid.checkpoint import Checkpoint
from tpuvid.registry import registry
from tpuvid.runtime import Runtime
from transformers import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel, T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

# transformer/config.json of the published checkpoints, as far as they differ from diffusers' defaults; some tensors of theirs
MODELS = {
    "wan2.1-t2v-14b": (
        diffusers.WanTransformer3DModel,
        dict(num_layers=40, num_attention_heads=40, attention_head_dim=128, ffn_dim=13824, text_dim=4096),
        {
            "patch_embedding.weight": (5120, 16, 1, 2, 2),
            "condition_embedder.text_embedder.linear_1.weight": (5120, 4096),
            "condition_embedder.time_proj.weight": (30720, 5120),
            "blocks.39.attn2.norm_k.weight": (5120,),
            "blocks.0.ffn.net.0.proj.weight": (13824, 5120),
            "blocks.0.scale_shift_table": (1, 6, 5120),
            "proj_out.weight": (64, 5120),
        },
    ),
    "wan2.1-t2v-1.3b": (
        diffusers.WanTransformer3DModel,
        dict(num_layers=30, num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, text_dim=4096),
        {"blocks.29.attn1.to_out.0.weight": (1536, 1536), "blocks.29.ffn.net.2.weight": (1536, 8960)},
    ),
    "hunyuanvideo-1.5-t2v-720p": (
        diffusers.HunyuanVideo15Transformer3DModel,
        dict(target_size=960, task_type="t2v"),
        {
            "x_embedder.proj.weight": (2048, 65, 1, 1, 1),
            "image_embedder.linear_1.weight": (1152, 1152),
            "context_embedder.proj_in.weight": (2048, 3584),
            "context_embedder.token_refiner.refiner_blocks.1.attn.to_q.weight": (2048, 2048),
            "context_embedder_2.linear_1.weight": (2048, 1472),
            "cond_type_embed.weight": (3, 2048),
            "transformer_blocks.53.attn.norm_added_k.weight": (128,),
            "transformer_blocks.53.norm1.linear.weight": (12288, 2048),
            "transformer_blocks.0.ff_context.net.2.weight": (2048, 8192),
            "proj_out.weight": (32, 2048),
        },
    ),
    "hunyuanvideo-1.5-t2v-480p": (
        diffusers.HunyuanVideo15Transformer3DModel,
        dict(target_size=640, task_type="t2v"),
        {"transformer_blocks.53.attn.add_q_proj.weight": (2048, 2048), "time_embed.timestep_embedder.linear_1.weight": (2048, 256)},
    ),
    "cogvideox1.5-5b": (
        diffusers.CogVideoXTransformer3DModel,
        dict(
            num_layers=42, num_attention_heads=48, attention_head_dim=64, patch_size_t=2, patch_bias=False, sample_height=300,
            sample_width=300, sample_frames=81, use_rotary_positional_embeddings=True,
        ),
        {
            "patch_embed.proj.weight": (3072, 128),
            "patch_embed.text_proj.weight": (3072, 4096),
            "transformer_blocks.41.attn1.norm_q.weight": (64,),
            "transformer_blocks.41.norm1.linear.weight": (18432, 512),
            "transformer_blocks.0.ff.net.0.proj.weight": (12288, 3072),
            "norm_out.linear.weight": (6144, 512),
            "proj_out.weight": (128, 3072),
        },
    ),
}  # fmt: skip

T5_XXL = dict(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
OTHERS = {
    "wan2.1-t2v-14b": {
        "vae": lambda: diffusers.AutoencoderKLWan(),
        "text_encoder": lambda: UMT5EncoderModel(UMT5Config(vocab_size=256384, **T5_XXL)),
    },
    "cogvideox1.5-5b": {
        "vae": lambda: diffusers.AutoencoderKLCogVideoX(
            block_out_channels=(128, 256, 256, 512), latent_channels=16, layers_per_block=3, scaling_factor=0.7
        ),
        "text_encoder": lambda: T5EncoderModel(T5Config(vocab_size=32128, **T5_XXL)),
    },
    "hunyuanvideo-1.5-t2v-720p": {
        "vae": lambda: diffusers.AutoencoderKLHunyuanVideo15(),
        "text_encoder": lambda: Qwen2_5_VLTextModel(
            Qwen2_5_VLTextConfig(
                vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
                num_key_value_heads=4,
            )
        ),
    },
}  # fmt: skip

SCHEDULERS = {
    "wan": dict(_class_name="UniPCMultistepScheduler", prediction_type="flow_prediction", use_flow_sigmas=True),
    "hunyuan": dict(_class_name="FlowMatchEulerDiscreteScheduler", shift=9.0),
    "cogvideox": dict(_class_name="CogVideoXDDIMScheduler", prediction_type="v_prediction", rescale_betas_zero_snr=True),
}


def empty(make) -> torch.nn.Module:
    with init_empty_weights():
        return make()


def shapes_of(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """What `save_pretrained` would store: tied tensors once."""
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def write_holes(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """`shapes` as bfloat16 in two shards and their index."""
    names = sorted(shapes)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        shard, header, end = f"model-0000{number}-of-00002.safetensors", {}, 0
        for name in part:
            start, end = end, end + 2 * torch.Size(shapes[name]).numel()
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [start, end]}
            weight_map[name] = shard
        text = json.dumps(header).encode()
        with (folder / shard).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_json(path: Path, value: dict) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))


def denoiser_of(model: str, folder: Path, shapes: dict[str, tuple[int, ...]]):
    spec = registry().get(model)
    _, config, _ = MODELS[model]
    write_json(folder / "transformer" / "config.json", config)
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULERS[spec.family])
    write_json(folder / "guider" / "guider_config.json", {"_class_name": "ClassifierFreeGuidance", "guidance_scale": 6.0})
    write_holes(folder / "transformer", shapes)
    return spec.load("denoiser", Checkpoint(model, folder=folder), Runtime.create())


@pytest.mark.parametrize("model", MODELS)
def test_a_published_transformer_is_matched_tensor_by_tensor(model, tmp_path):
    make, config, published = MODELS[model]
    shapes = shapes_of(empty(lambda: make(**config)))
    assert {name: shapes.get(name) for name in published} == published
    assert f"{sum(torch.Size(s).numel() for s in shapes.values()) / 1e9:.1f}B" == registry().get(model).parameters
    denoiser_of(model, tmp_path, shapes).verify()
    assert sum(f.stat().st_blocks for f in tmp_path.rglob("*")) * 512 < 50e6, "holes take no disk"


@pytest.mark.parametrize("model", ["wan2.1-t2v-14b", "hunyuanvideo-1.5-t2v-720p", "cogvideox1.5-5b"])
def test_what_is_missing_left_over_or_of_another_shape_is_named(model, tmp_path):
    make, config, published = MODELS[model]
    shapes = shapes_of(empty(lambda: make(**config)))
    name = next(n for n in published if "blocks" in n and n.endswith(".weight"))
    others = {n: s for n, s in shapes.items() if n != name}
    for number, (changed, message) in enumerate(
        (
            (others, rf"1 missing \({name}\)"),
            (shapes | {"blocks.99.extra": (3,)}, r"1 left over \(blocks.99.extra\)"),
            (shapes | {name: (*shapes[name][:-1], 7)}, rf"{name} has shape .*7,?\), config.json asks for"),
        )
    ):
        (tmp_path / str(number)).mkdir()
        with pytest.raises(InputError, match=message):
            denoiser_of(model, tmp_path / str(number), changed).verify()


@pytest.mark.parametrize("model", OTHERS)
def test_published_vaes_are_matched(model, tmp_path):
    vae = empty(OTHERS[model]["vae"])
    write_json(tmp_path / "vae" / "config.json", dict(vae.config))
    write_holes(tmp_path / "vae", shapes_of(vae))
    registry().get(model).load("decoder", Checkpoint(model, folder=tmp_path), Runtime.create()).verify()


@pytest.mark.parametrize("model", OTHERS)
def test_published_text_encoders_are_matched(model, tmp_path):
    encoder = empty(OTHERS[model]["text_encoder"])
    (tmp_path / "text_encoder").mkdir()
    encoder.config.save_pretrained(tmp_path / "text_encoder")
    write_holes(tmp_path / "text_encoder", shapes_of(encoder))
    for name in ("tokenizer", "tokenizer_2"):
        config = {"tokenizer_class": "ByT5Tokenizer", "chat_template": "{{ messages }}"}
        write_json(tmp_path / name / "tokenizer_config.json", config)
    if model.startswith("hunyuan"):
        glyphs = empty(
            lambda: T5EncoderModel(T5Config(d_model=1472, d_kv=64, d_ff=3584, num_layers=12, num_heads=6, vocab_size=1510, feed_forward_proj="gated-gelu"))
        )  # fmt: skip
        (tmp_path / "text_encoder_2").mkdir()
        glyphs.config.save_pretrained(tmp_path / "text_encoder_2")
        write_holes(tmp_path / "text_encoder_2", shapes_of(glyphs))
    registry().get(model).load("text_encoder", Checkpoint(model, folder=tmp_path), Runtime.create()).verify()
