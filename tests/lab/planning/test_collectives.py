"""What is read from a compiled program's text, for each way in which XLA's compilers write it."""

import pytest

from sst_jax.lab.planning.collectives import sent

LOOP = """HloModule step

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

%piece (p: u8[1,64,8]) -> u8[1,64,64] {
  ROOT %gather.1 = u8[1,64,64]{2,1,0:T(8,128)(4,1)} all-gather(%p), channel_id=5, GROUPS, dimensions={2}
}

%body (state: (s32[], f32[16])) -> (s32[], f32[16]) {
  %first = u8[1,64,64]{2,1,0} fusion(%x), kind=kCustom, calls=%piece
  %second = u8[1,64,64]{2,1,0} fusion(%y), kind=kCustom, calls=%piece
  %all = f32[16]{0} all-reduce(%z), channel_id=6, GROUPS, to_apply=%sum
  ROOT %next = (s32[], f32[16]) tuple(%i, %all)
}

%condition (state: (s32[], f32[16])) -> pred[] {
  %limit = s32[]{:T(128)} constant(7)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (x: f32[16]) -> f32[16] {
  %loop = (s32[], f32[16]) while(%start), condition=%condition, body=%body
  ROOT %out = f32[16] get-tuple-element(%loop), index=1
}
"""


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4),
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups=mesh['data'=2,'fsdp'=4,'tensor'=1] {'fsdp'}", 4),
        ("replica_groups=mesh['data'=2,'fsdp'=4,'tensor'=1] {'data','fsdp'}", 8),
        ("replica_groups={}", 8),
    ],
)
def test_loops_multiply_and_pieces_of_one_collective_count_once(groups, size):
    found = sent(LOOP.replace("GROUPS", groups), 8)
    share = (size - 1) / size
    assert found == {"all-gather": 7 * 64 * 64 * share, "all-reduce": pytest.approx(7 * 2 * 64 * share)}


def test_the_compiler_s_own_count_of_a_loop_is_taken():
    noted = LOOP.replace("GROUPS", "replica_groups={}").replace(
        "body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"3"}}'
    )
    assert sent(noted, 8) == {"all-gather": 3 * 64 * 56, "all-reduce": 3 * 2 * 56}


@pytest.mark.parametrize(
    ("line", "kind", "size"),
    [
        ("%a = (bf16[8,4]{1,0}, bf16[64,4]{1,0}) all-gather-start(%x), replica_groups=[1,8]<=[8]", "all-gather", 448),
        ("%a = f32[8]{0} reduce-scatter(%x), replica_groups=[1,8]<=[8], to_apply=%sum", "reduce-scatter", 224),
        ("%a = (f32[8]{0}, s8[8]{0}) all-reduce(%x, %y), replica_groups=[4,2]<=[8], to_apply=%sum", "all-reduce", 40),
        ("%a = u8[64]{0} all-to-all(%x), replica_groups=[1,8]<=[8]", "all-to-all", 56),
        (
            "%a = (u8[64]{0}, u8[64]{0}) collective-permute-start(%x), source_target_pairs={{0,1}}",
            "collective-permute",
            64,
        ),
        ("%a = f8e4m3fn[64]{0} collective-permute(%x), source_target_pairs={{0,1}}", "collective-permute", 64),
    ],
)
def test_bytes_of_each_kind(line, kind, size):
    assert sent(f"ENTRY %main (x: f32[8]) -> f32[8] {{\n  {line}\n}}\n", 8) == {kind: size}


def test_a_branch_counts_as_its_costlier_side():
    text = """
%small (p: f32[4]) -> f32[4] {
  ROOT %a = f32[4]{0} all-to-all(%p), channel_id=1, replica_groups=[1,2]<=[2]
}

%large (p: f32[4]) -> f32[4] {
  ROOT %b = f32[8]{0} all-to-all(%p), channel_id=2, replica_groups=[1,2]<=[2]
}

ENTRY %main (x: f32[4]) -> f32[4] {
  ROOT %c = f32[4] conditional(%x, %y, %z), branch_computations={%small, %large}
}
"""
    assert sent(text, 2) == {"all-to-all": 16}


def test_a_program_of_one_device_sends_nothing():
    assert sent("ENTRY %main (x: f32[4]) -> f32[4] {\n  ROOT %a = f32[4]{0} add(%x, %x)\n}\n", 1) == {}
