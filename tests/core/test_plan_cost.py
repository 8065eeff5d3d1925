"""What a program takes, from small schedules written by hand: every figure can be worked out on paper."""

import json
import math

import pytest
from tpuvid.plan import hlo
from tpuvid.plan.cost import predict
from tpuvid.plan.flops import multiply_flops
from tpuvid.plan.topologies import parse_topology

V6E_8 = parse_topology("v6e-8")
COORDS = [(x, y, 0) for y in range(4) for x in range(2)]
CLOCK, HBM, LINK, PEAK = 1.75e9, 1638e9, 90e9, 918e12
HEAD = "HloModule jit_f, is_scheduled=true, num_partitions=8\n"

NEGATE = """
%negate (q: f32[1024,1024]) -> f32[1024,1024] {
  %q = f32[1024,1024]{1,0:T(8,128)} parameter(0)
  ROOT %n = f32[1024,1024]{1,0:T(8,128)} negate(%q)
}
"""
MB4 = 4 * 1024 * 1024
"""Bytes of f32[1024,1024]."""


def program(*lines: str, computations: str = "") -> str:
    body = "\n".join(f"  {line}" for line in lines)
    return f"{HEAD}{computations}\nENTRY %main (p: f32[1024,1024]) -> f32[1024,1024] {{\n{body}\n}}\n"


def fusion(name: str, operands: str, calls: str, cycles: int = 0, shape: str = "f32[1024,1024]{1,0:T(8,128)}") -> str:
    estimate = f', backend_config={{"window_config":{{"estimated_cycles":"{cycles}"}}}}' if cycles else ""
    return f"%{name} = {shape} fusion({operands}), kind=kLoop, calls=%{calls}{estimate}"


P = "%p = f32[1024,1024]{1,0:T(8,128)} parameter(0)"
P_VMEM = "%p = f32[1024,1024]{1,0:T(8,128)S(1)} parameter(0)"


def test_the_longer_of_cycles_and_bandwidth():
    slow = predict(program(P, fusion("f", "%p", "negate", 1_750_000), computations=NEGATE), V6E_8)
    assert slow.seconds == pytest.approx(1e-3)
    assert slow.parts["elementwise"].estimated_seconds == pytest.approx(1e-3)
    assert slow.parts["elementwise"].hbm_bound_seconds == 0
    fast = predict(program(P, fusion("f", "%p", "negate", 100), computations=NEGATE), V6E_8)
    assert fast.hbm_bytes == 2 * MB4
    assert fast.seconds == fast.parts["elementwise"].hbm_bound_seconds == pytest.approx(2 * MB4 / HBM)


def test_a_counted_schedule_replaces_the_estimate_of_all_alike():
    text = program(P, fusion("f", "%p", "negate", 9_999_999), fusion("g", "%f", "negate.2", 9_999_999),
                   computations=NEGATE + NEGATE.replace("%", "%x").replace("%xnegate", "%negate.2"))  # fmt: skip
    found = predict(text, V6E_8, schedule_cycles={"f": 1_750_000})
    assert found.seconds == pytest.approx(2e-3), "libtpu dumps code that two instructions share once"
    assert found.parts["elementwise"].estimated_seconds == 0


def test_other_code_keeps_its_estimate():
    computations = NEGATE + NEGATE.replace("negate(", "sine(").replace("%negate", "%sine")
    text = program(P, fusion("f", "%p", "negate", 9_999_999), fusion("g", "%f", "sine", 1_750_000), computations=computations)
    assert predict(text, V6E_8, schedule_cycles={"f": 1_750_000}).parts["elementwise"].estimated_seconds == pytest.approx(1e-3)


def test_what_stays_in_vmem_moves_no_hbm_bytes():
    text = program(P_VMEM, fusion("f", "%p", "negate", 100), computations=NEGATE)
    assert predict(text, V6E_8).hbm_bytes == MB4
    text = program(P_VMEM, fusion("f", "%p", "negate", 100, "f32[1024,1024]{1,0:T(8,128)S(1)}"), computations=NEGATE)
    assert predict(text, V6E_8).hbm_bytes == 0


SLICES = """
%one_layer (w: f32[40,1024,1024], i: s32[]) -> f32[1,1024,1024] {
  %w = f32[40,1024,1024]{2,1,0:T(8,128)} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %b = f32[40,1024,1024]{2,1,0:T(8,128)} bitcast(%w)
  %s = f32[1,1024,1024]{2,1,0:T(8,128)} dynamic-slice(%b, %i, %zero, %zero), dynamic_slice_sizes={1,1024,1024}
  ROOT %n = f32[1,1024,1024]{2,1,0:T(8,128)} negate(%s)
}

%update (w: f32[40,1024,1024], x: f32[1,1024,1024], i: s32[]) -> f32[40,1024,1024] {
  %w = f32[40,1024,1024]{2,1,0:T(8,128)} parameter(0)
  %x = f32[1,1024,1024]{2,1,0:T(8,128)} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %d = f32[40,1024,1024]{2,1,0:T(8,128)} dynamic-update-slice(%w, %x, %i, %zero, %zero)
}
"""


def test_of_what_is_sliced_or_updated_only_that_part_moves():
    text = program(
        "%w = f32[40,1024,1024]{2,1,0:T(8,128)} parameter(0)",
        "%i = s32[] parameter(1)",
        fusion("f", "%w, %i", "one_layer", shape="f32[1,1024,1024]{2,1,0:T(8,128)}"),
        fusion("g", "%w, %f, %i", "update", shape="f32[40,1024,1024]{2,1,0:T(8,128)}"),
        computations=SLICES,
    )
    found = predict(text, V6E_8)
    index = 4
    assert found.parts["elementwise"].hbm_bytes == found.parts["other"].hbm_bytes == 2 * MB4 + index


LOOPS = """
%dots (q: f32[8,128], r: f32[128,256]) -> f32[8,256] {
  %q = f32[8,128]{1,0:T(8,128)} parameter(0)
  %r = f32[128,256]{1,0:T(8,128)} parameter(1)
  ROOT %d = f32[8,256]{1,0:T(8,128)} dot(%q, %r), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%cond (c: (s32[], f32[8,128], f32[128,256])) -> pred[] {
  %c = (s32[], f32[8,128], f32[128,256]) parameter(0)
  %n = s32[] constant(3)
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %t = pred[] compare(%i, %n), direction=LT
}

%inner (c: (s32[], f32[8,128], f32[128,256])) -> (s32[], f32[8,128], f32[128,256]) {
  %c = (s32[], f32[8,128]{1,0:T(8,128)}, f32[128,256]{1,0:T(8,128)}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%c), index=1
  %y = f32[128,256]{1,0:T(8,128)} get-tuple-element(%c), index=2
  %f = f32[8,256]{1,0:T(8,128)} fusion(%x, %y), kind=kOutput, calls=%dots
  ROOT %t = (s32[], f32[8,128]{1,0:T(8,128)}, f32[128,256]{1,0:T(8,128)}) tuple(%i, %x, %y)
}

%cond.2 (c: (s32[], f32[8,128], f32[128,256])) -> pred[] {
  %c = (s32[], f32[8,128], f32[128,256]) parameter(0)
  %n = s32[] constant(5)
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %t = pred[] compare(%i, %n), direction=LT
}

%outer (c: (s32[], f32[8,128], f32[128,256])) -> (s32[], f32[8,128], f32[128,256]) {
  %c = (s32[], f32[8,128]{1,0:T(8,128)}, f32[128,256]{1,0:T(8,128)}) parameter(0)
  ROOT %l = (s32[], f32[8,128]{1,0:T(8,128)}, f32[128,256]{1,0:T(8,128)}) while(%c), condition=%cond, body=%inner
}
"""
STATE = "(s32[], f32[8,128]{1,0:T(8,128)}, f32[128,256]{1,0:T(8,128)})"


def test_loops_within_loops_multiply():
    whole = f"ROOT %l = {STATE} while(%p), condition=%cond.2, body=%outer"
    found = predict(program(f"%p = {STATE} parameter(0)", whole, computations=LOOPS), V6E_8, schedule_cycles={"f": 1750})
    assert found.flops == found.parts["matmul"].flops == 15 * 2 * 8 * 128 * 256
    assert found.seconds == pytest.approx(15e-6)
    assert found.share_of_peak == pytest.approx(found.flops / 15e-6 / PEAK)


def test_a_loop_of_unknown_length_is_noted():
    whole = f"ROOT %l = {STATE} while(%p), condition=%cond.2, body=%outer"
    text = program(f"%p = {STATE} parameter(0)", whole, computations=LOOPS.replace("compare(%i, %n)", "compare(%i, %i)"))
    found = predict(text, V6E_8)
    assert found.flops == 2 * 8 * 128 * 256
    assert any("unknown length" in note for note in found.notes)


RING = 3 / 4 * MB4 / LINK
"""Seconds of an all-reduce of 4 MiB in a 2×2 block."""
GROUPS = "replica_groups=[2,4]<=[8], use_global_device_ids=true, to_apply=%negate"


def test_a_synchronous_collective_is_exposed():
    text = program(P, f"ROOT %r = f32[1024,1024]{{1,0:T(8,128)}} all-reduce(%p), {GROUPS}", computations=NEGATE)
    found = predict(text, V6E_8, coords=COORDS)
    assert found.seconds == found.parts["collectives"].seconds == pytest.approx(RING)
    (collective,) = found.collectives
    assert (collective.kind, collective.group, collective.count, collective.bytes) == ("all-reduce", 4, 1, MB4)
    assert collective.sent_bytes == 1.5 * MB4
    assert collective.exposed_seconds == collective.seconds == pytest.approx(RING)


def test_collectives_need_the_places_of_all_devices():
    text = program(P, f"ROOT %r = f32[1024,1024]{{1,0:T(8,128)}} all-reduce(%p), {GROUPS}", computations=NEGATE)
    with pytest.raises(ValueError, match="coords of 4 devices; the program has collectives of 8"):
        predict(text, V6E_8, coords=COORDS[:4])


@pytest.mark.parametrize("microseconds", [10, 1000])
def test_what_runs_between_start_and_done_hides_a_collective(microseconds):
    text = program(
        P,
        f"%s = f32[1024,1024]{{1,0:T(8,128)}} all-reduce-start(%p), {GROUPS}",
        fusion("f", "%p", "negate", microseconds * 1750),
        "%d = f32[1024,1024]{1,0:T(8,128)} all-reduce-done(%s)",
        computations=NEGATE,
    )
    found = predict(text, V6E_8, coords=COORDS)
    assert found.collective_seconds == pytest.approx(RING)
    assert found.parts["collectives"].seconds == pytest.approx(max(0, RING - microseconds * 1e-6))
    assert found.seconds == pytest.approx(max(RING, microseconds * 1e-6))


def test_two_collectives_at_once_share_the_links():
    text = program(
        P,
        f"%s = f32[1024,1024]{{1,0:T(8,128)}} all-reduce-start(%p), {GROUPS}",
        "%t = (f32[1024,1024]{1,0:T(8,128)}, f32[1024,1024]{1,0:T(8,128)}) collective-permute-start(%p), "
        "source_target_pairs={{0,1},{1,0}}",
        "%d = f32[1024,1024]{1,0:T(8,128)} all-reduce-done(%s)",
        "%e = f32[1024,1024]{1,0:T(8,128)} collective-permute-done(%t)",
        computations=NEGATE,
    )
    found = predict(text, V6E_8, coords=COORDS)
    assert found.seconds == pytest.approx(RING + MB4 / LINK)
    assert [c.exposed_seconds for c in found.collectives] == pytest.approx([RING, MB4 / LINK])


def test_a_collective_within_a_fusion_runs_beside_it():
    computations = f"""{NEGATE}
%both (q: f32[1024,1024]) -> f32[1024,1024] {{
  %q = f32[1024,1024]{{1,0:T(8,128)}} parameter(0)
  %g = f32[4096,1024]{{1,0:T(8,128)}} all-gather(%q), replica_groups=[2,4]<=[8], dimensions={{0}}
  ROOT %n = f32[1024,1024]{{1,0:T(8,128)}} negate(%q)
}}
"""
    gather = 3 / 8 * 4 * MB4 / LINK
    found = predict(program(P, fusion("f", "%p", "both", 17_500), computations=computations), V6E_8, coords=COORDS)
    assert found.collectives[0].bytes == 4 * MB4, "of its result"
    assert found.seconds == pytest.approx(gather)
    assert found.collectives[0].exposed_seconds == pytest.approx(gather - 10e-6)


def test_transfers_to_vmem_are_hidden_behind_work():
    text = program(
        P,
        "%s = (f32[1024,1024]{1,0:T(8,128)S(1)}, f32[1024,1024]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%p)",
        fusion("f", "%p", "negate", 1_750),
        "%d = f32[1024,1024]{1,0:T(8,128)S(1)} copy-done(%s)",
        computations=NEGATE,
    )
    found = predict(text, V6E_8)
    assert found.hbm_bytes == 3 * MB4
    assert found.seconds == pytest.approx(2 * MB4 / HBM), "the fusion takes longer than the copy, which waits for nothing"


PARTS = """
%moved (q: f32[1024,1024]) -> f32[1024,1024] {
  %q = f32[1024,1024]{1,0:T(8,128)} parameter(0)
  ROOT %t = f32[1024,1024]{1,0:T(8,128)} transpose(%q), dimensions={1,0}
}

%multiplied (q: f32[1024,1024]) -> f32[1024,1024] {
  %q = f32[1024,1024]{1,0:T(8,128)} parameter(0)
  %f = f32[1024,1024]{1,0:T(8,128)} fusion(%q), kind=kLoop, calls=%negate
  ROOT %c = f32[1024,1024]{1,0:T(8,128)} convolution(%f, %q), dim_labels=bf_oi->bf
}
"""


@pytest.mark.parametrize("calls, part", [("negate", "elementwise"), ("moved", "other"), ("multiplied", "matmul")])
def test_a_fusion_is_named_for_what_it_contains(calls, part):
    found = predict(program(P, fusion("f", "%p", calls, 1_750), computations=NEGATE + PARTS), V6E_8)
    assert [name for name, p in found.parts.items() if p.seconds] == [part]


HEADS = "bf16[5,1024,128]{2,1,0:T(8,128)(2,1)}"
KERNEL = (
    f"%q = {HEADS} parameter(0)",
    "%k = bf16[5,2048,128]{2,1,0:T(8,128)(2,1)} parameter(1)",
    f'%splash.1 = {HEADS} custom-call(%q, %k, %k), custom_call_target="tpu_custom_call"',
)


def test_attention_kernels_by_their_schedule_and_shapes():
    found = predict(program(*KERNEL), V6E_8, schedule_cycles={"splash.1": 1_750_000})
    assert found.seconds == found.parts["attention"].seconds == pytest.approx(1e-3)
    assert found.flops == 4 * 5 * 1024 * 2048 * 128
    known = predict(program(*KERNEL), V6E_8, schedule_cycles={"splash.1": 1.0}, kernel_flops={"splash.1": 1e12})
    assert known.seconds == pytest.approx(1e12 / PEAK), "no schedule is faster than the peak"


def test_a_kernel_without_a_schedule_has_no_time():
    found = predict(program(*KERNEL), V6E_8)
    assert found.seconds is None and found.share_of_peak is None
    assert "splash.1" in found.reason
    assert found.flops


def test_on_a_chip_without_a_clock_there_are_bytes_but_no_seconds():
    text = program(P, f"ROOT %r = f32[1024,1024]{{1,0:T(8,128)}} all-reduce(%p), {GROUPS}", computations=NEGATE)
    found = predict(text, parse_topology("v5e-8"), coords=COORDS)
    assert found.seconds is None and "clock" in found.reason
    assert all(part.seconds is None for part in found.parts.values())
    assert found.collective_seconds == pytest.approx(3 / 4 * MB4 / 50e9)
    assert found.collectives[0].exposed_seconds is None
    json.dumps(found.to_dict())


def flops(out: str, left: str, right: str, attributes: str) -> float:
    text = f"{HEAD}\nENTRY %m (a: f32[1], b: f32[1]) -> f32[1] {{\n  %a = {left} parameter(0)\n  %b = {right} parameter(1)\n"
    entry = hlo.parse(f"{text}  ROOT %c = {out} {attributes}\n}}\n").entry
    return multiply_flops(entry, entry.instructions["c"])


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (
            ("f32[4,8,32]", "f32[4,8,16]", "f32[4,16,32]", "dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}"),
            4 * 8 * 32 * 16,
        ),
        (("f32[8,32]", "f32[8,16]", "f32[32,16]", "convolution(%a, %b), dim_labels=bf_oi->bf"), 8 * 32 * 16),
        # 3 taps, the outer two fall into the padding at the ends
        (
            (
                "f32[1,8,32]",
                "f32[1,8,16]",
                "f32[3,16,32]",
                "convolution(%a, %b), window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f",
            ),
            32 * 16 * (3 * 8 - 2),
        ),
        (
            (
                "f32[1,4,32]",
                "f32[1,8,16]",
                "f32[1,16,32]",
                "convolution(%a, %b), window={size=1 stride=2}, dim_labels=b0f_0io->b0f",
            ),
            32 * 16 * 4,
        ),
        # a batched product as XLA writes it for TPUs: each batch entry meets its own kernel alone
        (
            (
                "f32[4,8,32]",
                "f32[4,8,16]",
                "f32[4,16,32]",
                "convolution(%a, %b), window={size=4 stride=3 pad=0_0 lhs_dilate=4}, dim_labels=0bf_0io->0bf",
            ),
            4 * 8 * 32 * 16,
        ),
    ],
    ids=["batched dot", "matmul", "padding", "stride", "batch as space"],
)
def test_multiplications_are_counted_by_shapes(arguments, expected):
    assert math.isclose(flops(*arguments), 2 * expected)
