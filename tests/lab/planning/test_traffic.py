# ruff: noqa: E501  # XLA's own lines
"""Bytes and kernels of optimised HLO, against sums made by hand of a text as XLA writes it."""

from sst_jax.lab.planning.traffic import Assumed, Traffic, kernels, traffic

HLO = """
HloModule jit_step

%fused_slice (p0: bf16[62,8,16], p1: s32[], p2: f32[8]) -> f32[16] {
  %p0 = bf16[62,8,16]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %sliced = bf16[1,8,16]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,8,16}
  %flat = bf16[8,16]{1,0} bitcast(%sliced)
  %p2 = f32[8]{0} parameter(2)
  ROOT %out = f32[16]{0} multiply(%flat, %p2)
}

%fused_repeat (p0.2: bf16[62,4,16], p1.2: s32[]) -> bf16[8,16] {
  %p0.2 = bf16[62,4,16]{2,1,0} parameter(0)
  %p1.2 = s32[] parameter(1)
  %zero.2 = s32[] constant(0)
  %twice = bf16[62,4,2,16]{3,2,1,0} broadcast(%p0.2), dimensions={0,1,3}
  %rows = bf16[62,8,16]{2,1,0} bitcast(%twice)
  ROOT %layer = bf16[1,8,16]{2,1,0} dynamic-slice(%rows, %p1.2, %zero.2, %zero.2), dynamic_slice_sizes={1,8,16}
}

%fused_update (p0.1: f32[4,100], p1.1: f32[1,100]) -> f32[4,100] {
  %p0.1 = f32[4,100]{1,0} parameter(0)
  %p1.1 = f32[1,100]{1,0} parameter(1)
  %at = s32[] constant(2)
  ROOT %updated = f32[4,100]{1,0} dynamic-update-slice(%p0.1, %p1.1, %at, %at)
}

%local (a: f32[10]) -> f32[10] {
  %a = f32[10]{0} parameter(0)
  ROOT %copy.1 = f32[10]{0} copy(%a)
}

%global (b: f32[10]) -> f32[10] {
  %b = f32[10]{0} parameter(0)
  %copy.2 = f32[10]{0} copy(%b)
  ROOT %copy.3 = f32[10]{0} copy(%copy.2)
}

%body (carry: (s32[], bf16[62,8,16], f32[8], f32[10])) -> (s32[], bf16[62,8,16], f32[8], f32[10]) {
  %carry = (s32[], bf16[62,8,16]{2,1,0}, f32[8]{0}, f32[10]{0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %stack = bf16[62,8,16]{2,1,0} get-tuple-element(%carry), index=1
  %x = f32[8]{0} get-tuple-element(%carry), index=2
  %c = f32[10]{0} get-tuple-element(%carry), index=3
  %read = f32[16]{0} fusion(%stack, %i, %x), kind=kLoop, calls=%fused_slice
  %choice = pred[] constant(true)
  %chosen = f32[10]{0} conditional(%choice, %c, %c), true_computation=%global, false_computation=%local, metadata={op_name="jit(step)/layer_kind/cond"}
  ROOT %next = (s32[], bf16[62,8,16]{2,1,0}, f32[8]{0}, f32[10]{0}) tuple(%i, %stack, %x, %chosen)
}

%condition (carry.1: (s32[], bf16[62,8,16], f32[8], f32[10])) -> pred[] {
  %carry.1 = (s32[], bf16[62,8,16]{2,1,0}, f32[8]{0}, f32[10]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%carry.1), index=0
  %bound = s32[] constant(62)
  ROOT %less = pred[] compare(%i.1, %bound), direction=LT
}

ENTRY %main (codes: u8[62,32,128], cache: f32[4,100], row: f32[1,100], start: (s32[], bf16[62,8,16], f32[8], f32[10]), scales: bf16[62,4,16]) -> f32[4,100] {
  %codes = u8[62,32,128]{2,1,0} parameter(0)
  %cache = f32[4,100]{1,0} parameter(1)
  %row = f32[1,100]{1,0} parameter(2)
  %start = (s32[], bf16[62,8,16]{2,1,0}, f32[8]{0}, f32[10]{0}) parameter(3)
  %loop = (s32[], bf16[62,8,16]{2,1,0}, f32[8]{0}, f32[10]{0}) while(%start), condition=%condition, body=%body LOOP
  %product = f32[1,16,128]{2,1,0} custom-call(%codes), custom_call_target="__gpu$xla.gpu.triton"
  %scales = bf16[62,4,16]{2,1,0} parameter(4)
  %which = s32[] constant(3)
  %repeated = bf16[8,16]{1,0} fusion(%scales, %which), kind=kLoop, calls=%fused_repeat
  %gemm = (f32[4,4]{1,0}, s8[4194304]{0}) custom-call(%row), custom_call_target="__cublas$gemm"
  ROOT %done = f32[4,100]{1,0} fusion(%cache, %row), kind=kLoop, calls=%fused_update
}
"""
KNOWN = HLO.replace("LOOP", ', backend_config={"known_trip_count":{"n":"62"}}')
UNKNOWN = HLO.replace("LOOP", "")
ENTRY = (32 * 128 + 4 * 16 * 128) + (400 + 4 * 16) + (400 + 400)  # one layer of codes; no workspace; one row written
ENTRY += 4 * 16 * 2 + 4 + 8 * 16 * 2  # one layer of scales, read once though they are repeated; the index; the result
TURN = 8 * 16 * 2 + 4 + 4 * 8 + 4 * 16  # one layer of the stack, the index, x, and the result


def test_loops_slices_updates_and_the_costlier_branch():
    assert traffic(KNOWN) == Traffic(ENTRY + 62 * (TURN + 2 * 80), 4 + 62 * 3)


def test_branches_and_turns_that_are_told():
    told = Assumed(branches={"layer_kind": (0.75, 0.25)})
    assert traffic(KNOWN, told) == Traffic(ENTRY + 62 * (TURN + 0.75 * 80 + 0.25 * 160), 4 + 62 * (1 + 0.75 + 0.5))
    check = 4 + 4 + 1  # of whether the loop goes on, where its turns are decided on the device
    assert traffic(UNKNOWN, Assumed((5.0,))) == Traffic(ENTRY + 5 * (TURN + 160 + check), 4 + 5 * 4)


def test_each_kernel_says_how_often_it_runs():
    assert {one.name: one.times for one in kernels(KNOWN)} == {
        "read": 62, "copy.2": 62, "copy.3": 62, "product": 1, "repeated": 1, "gemm": 1, "done": 1
    }  # fmt: skip
