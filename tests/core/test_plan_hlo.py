"""Scheduled HLO text as libtpu writes it, parsed: shapes, memories, loops, groups."""

import pytest
from tpuvid.plan import hlo

HEAD = "HloModule jit_f, is_scheduled=true, num_partitions=8\n\n"


def entry(*lines: str) -> hlo.Computation:
    body = "\n".join(f"  {line}" for line in lines)
    return hlo.parse(f"{HEAD}ENTRY %main (p: f32[8]) -> f32[8] {{\n{body}\n}}\n").entry


def test_arrays_are_padded_to_tiles_and_know_their_memory():
    (i,) = entry("ROOT %a = (bf16[10,5120]{1,0:T(8,128)(2,1)}, f32[3]{0:T(128)S(1)}, /*index=2*/u32[]{:S(2)}) custom-call()")
    hbm, vmem, flag = i.outputs
    assert (hbm.bytes, hbm.hbm_bytes) == (16 * 5120 * 2, 16 * 5120 * 2)
    assert (vmem.bytes, vmem.space, vmem.hbm_bytes) == (128 * 4, hlo.VMEM, 0)
    assert flag.shape == () and flag.hbm_bytes == 0


def test_tiles_lie_along_the_minor_dimensions_of_the_layout():
    (i,) = entry("ROOT %a = f32[100,3]{0,1:T(4,128)} parameter(0)")
    assert i.outputs[0].bytes == 128 * 4 * 4


def test_operands_attributes_and_line_breaks():
    _, i = entry(
        '%p = f32[8]{0} parameter(0), metadata={op_name="x (y)"}',
        'ROOT %k.1 = f32[8]{0} custom-call(%p, /*index=1*/%p), custom_call_target="tpu_custom_call", '
        "frontend_attributes={kernel_metadata={",
        '"a":"{1}"',
        '}}, metadata={op_name="jit(f)/kernel" stack_frame_id=7}, backend_config={"window_config":{"estimated_cycles":"12"}}',
    )
    assert i.operands == ("p", "p")
    assert (i.target, i.op_name, i.estimated_cycles) == ("tpu_custom_call", "jit(f)/kernel", 12)


@pytest.mark.parametrize(
    "text, groups",
    [
        ("{{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['a'=2,'b'=1,'c'=4] {'c'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("mesh['a'=2,'c'=4] {'a'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("{}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ],
)
def test_replica_groups(text, groups):
    i = entry(
        "%p = f32[8]{0} parameter(0)", f"ROOT %r = f32[8]{{0}} all-reduce(%p), channel_id=1, replica_groups={text}, to_apply=%a"
    )
    assert list(i)[-1].groups(8) == groups


def test_unknown_replica_groups_fail():
    *_, i = entry("ROOT %r = f32[8]{0} all-gather(), replica_groups=[2,4]<=weird, dimensions={0}")
    with pytest.raises(ValueError, match="unknown form"):
        i.groups(8)


LOOP = """
%body (b: (s32[], f32[8])) -> (s32[], f32[8]) {
  %b = (s32[], f32[8]{0}) parameter(0)
  ROOT %next = (s32[], f32[8]{0}) custom-call(%b)
}

%compare (x: s32[], y: s32[]) -> pred[] {
  %x = s32[] parameter(0)
  %y = s32[] parameter(1)
  ROOT %lt = pred[] compare(%x, %y), direction=LT
}

%cond (c: (s32[], f32[8])) -> pred[] {
  %c = (s32[], f32[8]{0}) parameter(0)
  %n = s32[] constant(40)
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %test = pred[] TEST
}

ENTRY %main (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  ROOT %loop = (s32[], f32[8]{0}) while(%p), condition=%cond, body=%body
}
"""


@pytest.mark.parametrize(
    "test, trips",
    [
        ("compare(%i, %n), direction=LT", 40),
        ("fusion(%i, %n), kind=kLoop, calls=%compare", 40),
        ("compare(%i, %i), direction=LT", None),
        ("compare(%i, %n), direction=NE", None),
    ],
)
def test_trip_counts_from_the_condition(test, trips):
    module = hlo.parse(HEAD + LOOP.replace("TEST", test))
    assert module.trip_count(module.entry.instructions["loop"]) == trips
    assert module.devices == 8


def test_the_compilers_note_of_a_trip_count_wins():
    noted = LOOP.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}')
    module = hlo.parse(HEAD + noted.replace("TEST", "compare(%i, %n), direction=LT"))
    assert module.trip_count(module.entry.instructions["loop"]) == 7


@pytest.mark.parametrize("text", ["", "HloModule jit_f\n\nENTRY %m () -> f32[] {\n}\n", HEAD])
def test_what_is_not_a_schedule_is_refused(text):
    with pytest.raises(ValueError, match="not a compiled program's HLO"):
        hlo.parse(text)
