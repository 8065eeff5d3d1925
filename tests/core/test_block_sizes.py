import json
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from tpuvid.compute.kernels import recorded_attention
from tpuvid.compute.kernels.block_sizes import LONG, VARIABLE, AttentionShape, Blocks, Row, flash_blocks, read_rows
from tpuvid.compute.kernels.flash import attention_flash
from tpuvid.compute.runtime import plugin_tables
from tpuvid.errors import InputError
from tpuvid.family import Runtime
from tpuvid.plan.topologies import parse_topology

CHIP = "TPU v6 lite"


def row(blocks, *, chip=CHIP, heads=5, queries=9000, keys=9000, head_dim=128):
    sizes = dict(zip(("block_q", "block_kv", "block_kv_compute"), blocks, strict=True))
    about = dict(predicted_ms=1.0, jax="0", libtpu="0", date="2026-11-20", command="test")
    return Row(chip=chip, heads=heads, queries=queries, keys=keys, head_dim=head_dim, **sizes, **about)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A function that makes rows the user's own."""

    def write(*rows):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        path.write_text(json.dumps([r._asdict() for r in rows]))
        monkeypatch.setenv(VARIABLE, str(path))
        return path

    return write


def test_a_plugins_broken_table_is_left_out(tmp_path, monkeypatch):
    (good := tmp_path / "good.json").write_text(json.dumps([row((256, 256, 128))._asdict()]))
    (bad := tmp_path / "bad.json").write_text("[{}]")
    monkeypatch.setattr("tpuvid.compute.runtime.registry", lambda: SimpleNamespace(block_sizes=(bad, good)))
    plugin_tables.cache_clear()
    try:
        with pytest.warns(UserWarning, match="left out: .*bad.json: is no table"):
            assert plugin_tables() == (good,)
    finally:
        plugin_tables.cache_clear()


@pytest.mark.parametrize(
    "queries, keys, dim, expected",
    [
        (75600, 75600, 128, LONG),
        (75600, 512, 128, LONG),
        (100, 2048, 64, LONG),
        (75600, 75600, 384, Blocks(768, 1408, 384)),  # three times as wide: a third of the rows fits into VMEM
    ],
)
@pytest.mark.parametrize("chip", [None, "TPU v5 lite"])
def test_without_a_row_the_default_shrinks_with_wider_heads(chip, queries, keys, dim, expected):
    assert flash_blocks(queries, keys, dim, chip=chip) == expected


def test_the_row_of_a_shape_is_for_its_chip_alone(table):
    table(row((1024, 1024, 512)), row((512, 512, 512), heads=2))
    assert flash_blocks(9000, 9000, 128, heads=5, chip=CHIP) == (1024, 1024, 512)
    assert flash_blocks(9000, 9000, 128, heads=2, chip=CHIP) == (512, 512, 512)
    assert flash_blocks(9000, 9000, 128, heads=9, chip=CHIP) == (1024, 1024, 512)
    assert flash_blocks(9000, 9000, 128, chip="TPU v5 lite") == LONG
    assert flash_blocks(9000, 9000, 128) == LONG


def test_other_lengths_take_the_default(table):
    table(row((1024, 1024, 512)), row((4096, 1024, 256), queries=4500, keys=4500, head_dim=64))
    assert flash_blocks(8000, 8000, 128, chip=CHIP) == LONG
    assert flash_blocks(9000, 512, 128, chip=CHIP) == LONG


@pytest.mark.parametrize(
    "text",
    ["", "{}x", '[{"chip": 1}]', json.dumps([row((100, 128, 128))._asdict()]), json.dumps([row((128, 384, 256))._asdict()])],
)
def test_what_is_no_table_is_refused_before_anything_runs(tmp_path, monkeypatch, text):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="rows.json"):
        read_rows(path)
    monkeypatch.setenv(VARIABLE, str(path))
    with pytest.raises(InputError, match="rows.json"):
        Runtime.create()


def test_calls_of_the_kernel_are_recorded_while_tracing():
    def f(q, k, mask):
        return attention_flash(q, k, k, interpret=True), attention_flash(k, k, k, kv_mask=mask, interpret=True)

    q, k = jax.ShapeDtypeStruct((2, 3, 40, 64), jnp.bfloat16), jax.ShapeDtypeStruct((2, 3, 30, 64), jnp.bfloat16)
    mask = jax.ShapeDtypeStruct((2, 30), bool)
    with recorded_attention() as calls:
        jax.eval_shape(f, q, k, mask)
    assert calls == [AttentionShape(3, 40, 30, 64), AttentionShape(3, 30, 30, 64)]
    jax.eval_shape(lambda *args: f(*args), q, k, mask)
    assert len(calls) == 2, "recording has ended"


def test_given_blocks_are_used(monkeypatch):
    x = jnp.ones((1, 1, 300, 128), jnp.bfloat16)
    monkeypatch.setattr("tpuvid.compute.kernels.flash.flash_blocks", lambda *_, **__: pytest.fail("the table was read"))
    assert attention_flash(x, x, x, blocks=Blocks(128, 256, 128), interpret=True).shape == x.shape


SHARDED = """
import json, jax, jax.numpy as jnp
from tpuvid.compute.kernels import attention, placed_on, recorded_attention
from tpuvid.compute.kernels.block_sizes import flash_blocks
from tpuvid.compute.mesh import make_mesh
from tpuvid.contract import MeshConfig
from tpuvid.plan.topologies import parse_topology
from unittest import mock

mesh = make_mesh(MeshConfig(dp=2, tp=4), parse_topology("v6e-8").jax_devices())
x = jax.ShapeDtypeStruct((2, 40, 75600, 128), jnp.bfloat16)
blocks = mock.patch("tpuvid.compute.kernels.flash.flash_blocks", wraps=flash_blocks)
with placed_on(mesh), recorded_attention() as calls, blocks as read:
    jax.eval_shape(lambda x: attention(x, x, x), x)
print(json.dumps([calls, read.call_args.kwargs]))
"""


@pytest.mark.aot
def test_the_sharded_kernel_asks_for_its_own_share_and_chip(python_env):
    environment = python_env | parse_topology("v6e-8").environment()
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", SHARDED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    calls, asked = json.loads(done.stdout)
    assert calls == [[10, 75600, 75600, 128]] and asked == {"heads": 10, "chip": CHIP}
