"""What the installed model packages bring to parts of core."""

import json
from dataclasses import replace

import pytest
from tpuvid.compute.kernels.block_sizes import VARIABLE, AttentionShape, block_rows, flash_blocks, read_rows, tables_in_use
from tpuvid.compute.mesh import make_mesh
from tpuvid.compute.runtime import plugin_tables
from tpuvid.contract import MeshConfig
from tpuvid.errors import InputError
from tpuvid.family import Runtime
from tpuvid.plan import tune
from tpuvid.plan.topologies import parse_topology
from tpuvid_wan.plugin import WAN_1_3B

CHIP = "TPU v6 lite"


def test_model_packages_bring_rows_with_provenance():
    """The hook tpuvid_block_sizes, and what the kernel makes of it."""
    assert {path.parent.name for path in plugin_tables()} == {"tpuvid_wan", "tpuvid_cogvideox", "tpuvid_hunyuan"}
    rows = [row for path in plugin_tables() for row in read_rows(path)]
    assert len({(r.chip, r.shape) for r in rows}) == len(rows) > 0
    runtime = Runtime.create()
    for r in rows:
        assert r.predicted_ms > 0 and r.date and r.jax and r.libtpu and r.command.startswith("tpuvid tune attention --")
        with runtime.scope(make_mesh(MeshConfig(), runtime.devices)):
            assert flash_blocks(r.queries, r.keys, r.head_dim, heads=r.heads, chip=r.chip) == r.blocks
    assert not block_rows(), "outside a run there are no plugins"


def test_the_users_row_comes_before_the_packages(tmp_path, monkeypatch):
    shipped = read_rows(plugin_tables()[0])[0]
    own = shipped._replace(chip=CHIP, heads=99, block_q=256, block_kv=256, block_kv_compute=128)
    (path := tmp_path / "rows.json").write_text(json.dumps([own._asdict()]))
    monkeypatch.setenv(VARIABLE, str(path))
    shape = dict(heads=shipped.heads, chip=CHIP)
    with tables_in_use(plugin_tables()[:1]):
        assert flash_blocks(shipped.queries, shipped.keys, shipped.head_dim, **shape) == (256, 256, 128)
        assert len(block_rows()) == len(read_rows(plugin_tables()[0]))


def test_a_model_without_windows_says_so():
    spec = replace(WAN_1_3B, takes=("flow_shift",))
    with pytest.raises(InputError, match="window_size=8: wan2.1-t2v-1.3b has no attention window; leave it out"):
        spec.configure(window_size=8)
    assert WAN_1_3B.configure(window_size=8).window_size == "frames=8"


@pytest.mark.aot
def test_the_shapes_of_a_model_are_those_of_its_step():
    shapes = tune.attention_shapes("wan2.1-t2v-14b", parse_topology("v6e-8"), {}, None)
    assert AttentionShape(10, 75648, 75648, 128) in shapes, "40 heads over sp=4, all tokens, padded"
    assert AttentionShape(40, 18912, 512, 128) in shapes, "to the text"
    assert tune.attention_shapes("wan2.1-t2v-14b", parse_topology("v6e-8"), {"num_frames": 5}, "dp=1,tp=8")[0].heads == 5
