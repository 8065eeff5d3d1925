"""What `tests/*/test_*_mesh.py` show of whole models on eight devices is not repeated here."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from tpuvid.compute.kernels import placed_on, token_attention
from tpuvid.compute.kernels.placement import TokenSplit, tokens_split
from tpuvid.compute.kernels.reference import attention_reference
from tpuvid.compute.kernels.tokens import Stream, padded_length
from tpuvid.compute.mesh import make_mesh
from tpuvid.contract import MeshConfig
from tpuvid.errors import InputError
from tpuvid.family import Runtime


@pytest.mark.parametrize(
    "length, parts, padded", [(75600, 4, 75648), (75600, 8, 75648), (1, 4, 128), (128, 16, 128), (300, 3, 384)]
)
def test_parts_are_whole_registers(length, parts, padded):
    assert padded_length(length, parts) == padded
    assert padded % parts == 0 == padded // parts % 8


def streams(seed=0):
    """Thirty tokens of a video and nine of a prompt, of which the last four don't count."""
    rng = np.random.default_rng(seed)
    video, text = (jnp.asarray(rng.normal(size=(3, 1, 2, n, 16)), jnp.float32) for n in (30, 9))
    mask = jnp.arange(9)[None] < 5
    return Stream("video", *video), Stream("text", *text, mask)


def expected():
    video, text = streams()
    query, key, value = (jnp.concatenate([video[i], text[i]], axis=2) for i in (1, 2, 3))
    mask = jnp.concatenate([jnp.ones((1, 30), bool), text.mask], axis=1)
    return attention_reference(query, key, value, mask=mask[:, None, None])


def test_streams_attend_to_each_other():
    video, text = token_attention(streams())
    np.testing.assert_allclose(jnp.concatenate([video, text], axis=2), expected(), atol=1e-5)


def test_padding_of_a_part_takes_no_part():
    """One part, padded as if there were more: what pads is as wild as can be."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])

    def pad(stream):
        arrays = (jnp.pad(x, ((0, 0), (0, 0), (0, 10), (0, 0)), constant_values=50.0) for x in stream[1:4])
        return Stream(stream.name, *arrays, stream.mask)

    def attend():
        with tokens_split(TokenSplit(1, {"video": 30, "text": 9})):
            return tuple(token_attention([pad(stream) for stream in streams()]))

    with placed_on(mesh):
        out = PartitionSpec()
        video, text = jax.shard_map(attend, mesh=mesh, in_specs=(), out_specs=(out, out), check_vma=False)()
    np.testing.assert_allclose(jnp.concatenate([video[:, :, :30], text[:, :, :9]], axis=2), expected(), atol=1e-5)


def module(*, splits_tokens):
    struct = jax.ShapeDtypeStruct((100, 10), np.dtype(np.float32))
    return SimpleNamespace(splits_tokens=splits_tokens, fsdp=False, parameters=lambda dtype: {"blocks.*.w": struct})


class Chip(SimpleNamespace):
    __hash__ = object.__hash__


def chips(count):
    return [Chip(platform="tpu", id=i, process_index=0, device_kind="TPU v6 lite") for i in range(count)]


@pytest.mark.parametrize(
    "gib, asked, fsdp", [(30, None, True), (10, None, False), (10, "dp=2,sp=4,fsdp", True), (30, "dp=2,sp=4,replicated", False)]
)
def test_weights_are_split_where_copies_would_fill_the_memory(gib, asked, fsdp):
    traced = module(splits_tokens=True)
    traced.parameters = lambda dtype: {"blocks.*.w": jax.ShapeDtypeStruct((gib, 2**28), np.dtype(np.float32))}
    runtime = Runtime(np.dtype(np.float32), devices=chips(8), mesh_config=asked and MeshConfig.parse(asked))
    mesh = runtime.denoiser_mesh(traced, 12, ())
    assert dict(mesh.shape) == {"dp": 2, "sp": 4, "tp": 1} and traced.fsdp is fsdp


def test_a_model_that_can_not_split_tokens_says_so():
    traced = module(splits_tokens=False)
    with pytest.raises(InputError, match="sp=4: this model can't split its tokens; use tp"):
        Runtime(np.dtype(np.float32), devices=chips(8), mesh_config=MeshConfig(sp=4)).denoiser_mesh(traced, 12, ())
    mesh = Runtime(np.dtype(np.float32), devices=chips(8)).denoiser_mesh(traced, 12, ((r"blocks\.\*\.w", ("tp", None)),))
    assert dict(mesh.shape) == {"dp": 2, "sp": 1, "tp": 4}
