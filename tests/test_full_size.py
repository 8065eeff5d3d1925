"""Checkpoints as published, at full size: every weight is matched, or an error names what is missing or left over.

The files are real safetensors with real headers and holes in the place of the data: 28 GB that take a few MB of disk.
"""

import json
import shutil
import struct
from importlib.resources import files
from pathlib import Path

import diffusers
import pytest
import torch
from accelerate import init_empty_weights
from tpuvid import InputError
from tpuvid.compute.stage_loader import open_stage
from tpuvid.family import Checkpoint, Runtime
from tpuvid.files.checkpoint import ConfigsOnly
from tpuvid.plugin.registry import registry
from transformers import AutoConfig, Qwen2_5_VLTextModel, T5EncoderModel, UMT5EncoderModel

# some tensors of the published checkpoints
PUBLISHED = {
    "wan2.1-t2v-14b": {
        "patch_embedding.weight": (5120, 16, 1, 2, 2),
        "condition_embedder.text_embedder.linear_1.weight": (5120, 4096),
        "condition_embedder.time_proj.weight": (30720, 5120),
        "blocks.39.attn2.norm_k.weight": (5120,),
        "blocks.0.ffn.net.0.proj.weight": (13824, 5120),
        "blocks.0.scale_shift_table": (1, 6, 5120),
        "proj_out.weight": (64, 5120),
    },
    "wan2.1-t2v-1.3b": {"blocks.29.attn1.to_out.0.weight": (1536, 1536), "blocks.29.ffn.net.2.weight": (1536, 8960)},
    "hunyuanvideo-1.5-t2v-720p": {
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
    "hunyuanvideo-1.5-t2v-480p": {
        "transformer_blocks.53.attn.add_q_proj.weight": (2048, 2048),
        "time_embed.timestep_embedder.linear_1.weight": (2048, 256),
    },
    "cogvideox1.5-5b": {
        "patch_embed.proj.weight": (3072, 128),
        "patch_embed.text_proj.weight": (3072, 4096),
        "transformer_blocks.41.attn1.norm_q.weight": (64,),
        "transformer_blocks.41.norm1.linear.weight": (18432, 512),
        "transformer_blocks.0.ff.net.0.proj.weight": (12288, 3072),
        "norm_out.linear.weight": (6144, 512),
        "proj_out.weight": (128, 3072),
    },
}
ENCODERS = {"umt5": UMT5EncoderModel, "t5": T5EncoderModel, "qwen2_5_vl_text": Qwen2_5_VLTextModel}


def configs(model: str) -> Path:
    """The folder of configs that the model's package brings."""
    package, _, inner = registry().get(model).configs.partition(":")
    return Path(str(files(package))) / inner


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


def checkpoint_of(model: str, folder: Path, component: str, shapes: dict[str, tuple[int, ...]]) -> Checkpoint:
    """The model's own configs, and weights of `shapes` for one component."""
    shutil.copytree(configs(model), folder, dirs_exist_ok=True)
    write_holes(folder / component, shapes)
    return Checkpoint(model, folder=folder)


def transformer_shapes(model: str) -> dict[str, tuple[int, ...]]:
    return shapes_of(from_config(configs(model) / "transformer"))


def from_config(folder: Path) -> torch.nn.Module:
    """A diffusers model without weights."""
    config = json.loads((folder / "config.json").read_text())
    return empty(lambda: getattr(diffusers, config["_class_name"]).from_config(config))


def text_encoder(folder: Path) -> torch.nn.Module:
    config = AutoConfig.from_pretrained(folder)
    return empty(lambda: ENCODERS[config.model_type](config))


@pytest.mark.parametrize("model", PUBLISHED)
def test_a_published_transformer_is_matched_tensor_by_tensor(model, tmp_path):
    shapes, spec = transformer_shapes(model), registry().get(model)
    assert {name: shapes.get(name) for name in PUBLISHED[model]} == PUBLISHED[model]
    assert f"{sum(torch.Size(s).numel() for s in shapes.values()) / 1e9:.1f}B" == spec.parameters
    open_stage(spec, "denoise", checkpoint_of(model, tmp_path, "transformer", shapes), Runtime.create()).verify()
    assert sum(f.stat().st_blocks for f in tmp_path.rglob("*")) * 512 < 50e6, "holes take no disk"


@pytest.mark.parametrize("model", PUBLISHED)
def test_configs_that_a_package_brings_are_those_of_its_model(model):
    spec = registry().get(model)
    transformer = json.loads((configs(model) / "transformer" / "config.json").read_text())
    assert {name: transformer[name] for name in spec.signature} == dict(spec.signature)
    ConfigsOnly(model, folder=configs(model), place=None).require(sum(spec.components.values(), ()))


@pytest.mark.parametrize("model", ["wan2.1-t2v-14b", "hunyuanvideo-1.5-t2v-720p", "cogvideox1.5-5b"])
def test_what_is_missing_left_over_or_of_another_shape_is_named(model, tmp_path):
    shapes = transformer_shapes(model)
    name = next(n for n in PUBLISHED[model] if "blocks" in n and n.endswith(".weight"))
    others = {n: s for n, s in shapes.items() if n != name}
    for number, (changed, message) in enumerate(
        (
            (others, rf"1 missing \({name}\)"),
            (shapes | {"blocks.99.extra": (3,)}, r"1 left over \(blocks.99.extra\)"),
            (shapes | {name: (*shapes[name][:-1], 7)}, rf"{name} has shape .*7,?\), config.json asks for"),
        )
    ):
        checkpoint = checkpoint_of(model, tmp_path / str(number), "transformer", changed)
        with pytest.raises(InputError, match=message):
            open_stage(registry().get(model), "denoise", checkpoint, Runtime.create()).verify()


@pytest.mark.parametrize("model", ["wan2.1-t2v-14b", "hunyuanvideo-1.5-t2v-720p", "cogvideox1.5-5b"])
def test_published_vaes_are_matched(model, tmp_path):
    checkpoint = checkpoint_of(model, tmp_path, "vae", shapes_of(from_config(configs(model) / "vae")))
    open_stage(registry().get(model), "decode", checkpoint, Runtime.create()).verify()


@pytest.mark.parametrize("model", ["wan2.1-t2v-14b", "hunyuanvideo-1.5-t2v-720p", "cogvideox1.5-5b"])
def test_published_text_encoders_are_matched(model, tmp_path):
    for component in registry().get(model).components["encode"]:
        if component.startswith("text_encoder"):
            shapes = shapes_of(text_encoder(configs(model) / component))
            checkpoint = checkpoint_of(model, tmp_path, component, shapes)
    open_stage(registry().get(model), "encode", checkpoint, Runtime.create()).verify()
