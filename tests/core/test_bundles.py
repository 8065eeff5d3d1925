"""Predicted cycles against what can be counted by hand: of a schedule written here, and of kernels that libtpu compiles."""

import json
import subprocess
import sys

import pytest
from tpuvid.compute.chips import CHIPS
from tpuvid.plan.bundles import dump_flags, kernels, no_time, pallas_grids, schedule
from tpuvid.plan.topologies import parse_topology

DELAY = ["", "", "", ""]


def dump(lines, units="MXU, SALU"):
    """The two texts that libtpu writes: bundles as in `lines`, each using one MXU slot of two and no SALU slot of four."""
    rows = [f"   {hex(i)} {label:>2}: {depth} {{ {text} }}" for i, (label, depth, text) in enumerate(lines)]
    table = f"== CAPACTIY:\n{units}\n  2  4\n== UTILIZATION:\n" + "1 0\n" * len(lines)
    return "LB: loop body\n\n" + "\n".join(rows), table


def grid_kernel(skip="%p3_p2", bound="6"):
    """Grid (2, 3): bundles 0-1 run once, 2-27 per step; among those a region, 12-16, and a loop of ten trips, 17-22."""
    outer = [
        "%s11_s0 = sphi %s10_s0, %s12_s0 /* phi copy :: iteration index, stage = 0 */  ;;  %s13_s1 = sphi %s10_s0, %s15_s1 "
        "/* iteration index, stage = 0 iter bound = 0 */  ;;  %s14_s2 = sphi %s10_s0, %s16_s2 /* iteration index, stage = 0 "
        "iter bound = 1 */ } /* Start region 1 */",
        "%s12_s0 = sadd.s32 1, %s11_s0",
        "%p1_p0 = scmp.ge.s32.totalorder %s14_s2, 3  ;;  = sst [smem:[#allocation9_spill]] %s13_s1",
        "%p2_p1 = scmp.ge.s32.totalorder %s13_s1, 2  ;;  %s17_s3 = sld [smem:[#allocation9_spill]]",
        "%p3_p2 = scmp.ne.s32.totalorder %s17_s3, 0  ;;  %p4_p3 = scmp.ne.s32.totalorder %s99_s9, 0",
        f"30 = sbr.rel ({skip}) target = $region2",
        *DELAY,
        *["region"] * 5,
    ]
    inner = [
        "%s21_s5 = sphi %s20_s4, %s22_s5 } /* Start region 3 :: Start region 2 */",
        "%s22_s5 = sadd.s32 1, %s21_s5  ;;  %s20_s4 = smov (!%p1_p0), 0  ;;  %p5_p4 = scmp.ge.s32.totalorder %s22_s5, 10 "
        "/* loop exit test */  ;;  31 = sbr.rel (!%p5_p4) target = $region3",
        *DELAY,
    ]
    last = [
        f"%p6_p5 = scmp.ge.s32.totalorder %s12_s0, {bound} /* loop exit test */  ;;  32 = sbr.rel (!%p6_p5) target = $region1",
        *DELAY,
    ]
    head = ["} /* entry bundle: %double.1 = custom-call(%x) */", "%s10_s0 = smov 0"]
    return dump(
        [("", "", text) for text in head]
        + [("" if i else "LB", ">", text) for i, text in enumerate(outer)]
        + [("" if i else "LB", ">>", text) for i, text in enumerate(inner)]
        + [("", ">", text) for text in last]
    )


def test_every_bundle_counts_as_often_as_it_runs():
    found = schedule("double.1", *grid_kernel())
    # 2 once; six steps of 10 before the region, 6 × 10 in the inner loop and 5 after it; the region where the row is 0
    assert found.cycles == 2 + 6 * (10 + 60 + 5) + 3 * 5
    assert found.bundles == 28 and found.grid == (2, 3) and found.uncertain == 0
    assert found.utilisation == {"MXU": 0.5, "SALU": 0.0}


def test_what_data_decides_is_counted_and_reported():
    found = schedule("double.1", *grid_kernel(skip="%p4_p3"))
    assert found.cycles == 2 + 6 * (10 + 60 + 5) + 6 * 5 and found.uncertain == 6 * 5
    found = schedule("double.1", *grid_kernel(bound="%s77_s7"))
    assert found.cycles == found.uncertain + 2, "the trips of the outer loop are not known"
    assert found.grid is None


def test_an_optimistic_kernel_never_enters_what_data_decides():
    found = schedule("optimistic_double.1", *grid_kernel(skip="%p4_p3"))
    assert found.cycles == 2 + 6 * (10 + 60 + 5) and found.uncertain == 6 * 5


def test_a_pipelined_loop_has_more_trips_than_steps():
    found = schedule("double.1", *grid_kernel(bound="8"))
    assert found.grid == (2, 3) and found.cycles == 2 + 8 * 75 + 3 * 5


def test_only_kernels_of_a_folder_are_read(tmp_path):
    bundles, table = grid_kernel()

    def write(name, text):
        (tmp_path / name).write_text(text)

    write("17-double.1-02-final_bundles.txt", bundles)
    write("17-double.1-00-final_hlo-static-per-bundle-utilization.txt", table)
    write("17-double.1-01-schedule-analysis_final_bundles.txt", "Schedule analysis:")
    write("18-fusion.1-02-final_bundles.txt", bundles.replace("custom-call", "fusion"))
    write("18-fusion.1-00-final_hlo-static-per-bundle-utilization.txt", "is not read")
    assert {name: round(k.cycles) for name, k in kernels(tmp_path).items()} == {"double.1": 467}


@pytest.mark.parametrize("chip", CHIPS, ids=lambda c: c.name)
def test_a_chip_without_a_clock_gets_a_reason_instead_of_a_time(chip):
    found = schedule("double.1", *grid_kernel())
    if chip.clock_ghz is None:
        assert found.milliseconds(chip) is None and chip.name in no_time(chip)
    else:
        assert found.milliseconds(chip) == found.cycles / chip.clock_ghz / 1e6 and no_time(chip) is None


def test_grids_are_found_wherever_a_kernel_is_called():
    import jax
    import jax.numpy as jnp
    from jax.experimental import pallas as pl

    def copy(x_ref, out_ref):
        out_ref[...] = x_ref[...]

    def f(x):
        spec = pl.BlockSpec((8, 128), lambda i, j: (i, j))
        run = pl.pallas_call(copy, grid=(2, 3), in_specs=[spec], out_specs=spec, out_shape=x, name="copy-it")
        return jax.lax.scan(lambda carry, _: (jax.jit(run)(carry), None), x, None, length=2)

    assert pallas_grids(jax.jit(f).trace(jnp.zeros((16, 384))).jaxpr) == {"copy_it": [(2, 3)]}


COMPILE = """
import jax, jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import SingleDeviceSharding
from tpuvid.plan.topologies import parse_topology

on_chip = SingleDeviceSharding(parse_topology("v6e-8").jax_devices()[0])

def kernel(name, rows, trips, once):
    def body(x_ref, out_ref):
        def work():
            out_ref[...] = jax.lax.fori_loop(0, trips, lambda i, c: jnp.tanh(c @ c), x_ref[...])
        pl.when(pl.program_id(1) == 0)(work) if once else work()
    spec = pl.BlockSpec((128, 128), lambda i, j: (i, j))
    shape = jax.ShapeDtypeStruct((rows * 128, 384), jnp.float32, sharding=on_chip)
    run = pl.pallas_call(body, grid=(rows, 3), in_specs=[spec], out_specs=spec, out_shape=shape, name=name)
    jax.jit(run).lower(shape).compile()

kernel("base", 4, 10, False)
kernel("twice_the_grid", 8, 10, False)
kernel("twice_the_trips", 4, 20, False)
kernel("first_column", 4, 10, True)

def stock(heads, queries, keys):
    mask = splash.MultiHeadMask([splash.FullMask((queries, keys)) for _ in range(heads)])
    sizes = splash.BlockSizes(block_q=3328, block_kv=2816, block_kv_compute=256)
    run = splash.make_splash_mha(mask=mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)
    args = [jax.ShapeDtypeStruct((heads, n, 128), jnp.bfloat16, sharding=on_chip) for n in (queries, keys, keys)]
    jax.jit(lambda q, k, v: run(q, k, v)).lower(*args).compile()

stock(5, 23 * 3328, 27 * 2816)
"""


@pytest.mark.aot
def test_real_schedules(tmp_path, python_env):
    topology = parse_topology("v6e-8")
    environment = python_env | topology.environment(dump_flags(tmp_path))
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = kernels(tmp_path)
    print(json.dumps({name: k.cycles for name, k in found.items()}))
    matmuls = {name.split(".")[0]: k.cycles * k.utilisation["MXU"] for name, k in found.items()}
    assert found["base.1"].grid == (4, 3) and found["base.1"].uncertain < 0.02 * found["base.1"].cycles
    assert matmuls["twice_the_grid"] == pytest.approx(2 * matmuls["base"])
    assert matmuls["twice_the_trips"] == pytest.approx(2 * matmuls["base"])
    assert matmuls["first_column"] == pytest.approx(matmuls["base"] / 3)
    # 12 steps more, of the same 782 bundles or so each
    assert found["twice_the_grid.1"].cycles == pytest.approx(2 * found["base.1"].cycles, rel=0.02)
    # published, measured: 43.93 ms; blocks and padding as there
    stock = next(k for name, k in found.items() if name.startswith("splash"))
    assert stock.grid == (5, 23, 27) and stock.uncertain == 0
    assert stock.milliseconds(topology.chip) == pytest.approx(44.4, rel=0.02)
