"""What is read of compiled programs, on texts of a few lines as the compilers of processors and of TPUs write them."""

import math

import pytest

from stare_jax.plan.exchanges import read_collectives
from stare_jax.plan.products import read_products
from stare_jax.plan.text import Program

LAYOUT = "{1,0:T(8,128)(2,1)S(1)}"
GROUP = "replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}"
GATHER = f"all-gather(%x), channel_id=6, {GROUP}, dimensions={{1}}"
ON = 'backend_config={"async_collective_fusion_config":{"flag_start":"2"}}'

TPU = f"""HloModule jit_f, is_scheduled=true, num_partitions=8

%start (x: bf16[128,1024]) -> (bf16[128,1024], bf16[1024,1024]) {{
  %x = bf16[128,1024]{LAYOUT} parameter(0)
  %all-gather.1 = bf16[1024,1024]{LAYOUT} {GATHER}, {ON}
}}

%product (x: bf16[128,1024], a: bf16[8,1024], w: bf16[1024,1024]) -> bf16[8,1024] {{
  %x = bf16[128,1024]{LAYOUT} parameter(0)
  %a = bf16[8,1024]{LAYOUT} parameter(1)
  %w = bf16[1024,1024]{LAYOUT} parameter(2)
  %all-gather.2 = bf16[1024,1024]{LAYOUT} {GATHER}, {ON}
  ROOT %convolution.1 = bf16[8,1024]{LAYOUT} convolution(%a, %w), dim_labels=bf_io->bf
}}

%all-reduce-scatter (g: bf16[1024,1024]) -> bf16[128,1024] {{
  %g = bf16[1024,1024]{LAYOUT} parameter(0)
  ROOT %all-reduce.1 = bf16[1024,1024]{LAYOUT} all-reduce(%g), channel_id=7, {GROUP}, to_apply=%add
}}

%body (p: (s32[], bf16[8,1024])) -> (s32[], bf16[8,1024]) {{
  %p = (s32[]{{:T(128)}}, bf16[8,1024]{LAYOUT}, /*index=2*/bf16[128,1024]{LAYOUT}) parameter(0)
  %begin = (bf16[128,1024]{LAYOUT}, bf16[1024,1024]{LAYOUT}) fusion(%p), kind=kCustom, calls=%start
  %fusion.1 = bf16[8,1024]{LAYOUT} fusion(%p), calls=%product, backend_config={{"estimated_cycles":"2634"}}
  %scatter = bf16[128,1024]{LAYOUT} fusion(%p), kind=kCustom, calls=%all-reduce-scatter
}}

%condition (p: (s32[], bf16[8,1024])) -> pred[] {{
  %constant.1 = s32[]{{:T(128)}} constant(5)
  %p = (s32[]{{:T(128)}}, bf16[8,1024]{LAYOUT}) parameter(0)
  ROOT %lt = pred[]{{:T(512)}} compare(%p, %constant.1), direction=LT
}}

ENTRY %main (p: bf16[8,1024]) -> bf16[8,1024] {{
  %while.1 = (s32[]{{:T(128)}}, bf16[8,1024]{LAYOUT}) while(%t), condition=%condition, body=%body
  %copy.1 = bf16[8,1024]{LAYOUT} copy(%p), backend_config={{"estimated_cycles":"10"}}
}}
"""


def test_a_program_of_a_tpu_is_read_with_its_loop():
    program = Program(TPU)
    assert program.num_devices == 8 and program.num_unknown_loops == 0
    assert program.estimated_cycles() == 5 * 2634 + 10
    (product,) = read_products(program)
    assert (product.flops, product.times) == (2 * 8 * 1024 * 1024, 5)
    assert product.num_bytes == 2 * (8 * 1024 + 1024 * 1024 + 8 * 1024)
    # One gather, although it stands where it begins and where it goes on.
    gather, scatter = read_collectives(program)
    assert (gather.kind, gather.num_bytes, gather.times, gather.group_size) == ("all-gather", 2 * 1024**2, 5, 8)
    assert (scatter.kind, scatter.num_bytes, scatter.trips) == ("reduce-scatter", 2 * 1024**2, (5,))
    assert scatter.sent_bytes == gather.sent_bytes == 2 * 1024**2 * 7 / 8


def entry(*lines):
    return "\n".join(["ENTRY %main (p: f32[8]) -> f32[8] {", *(f"  {line}" for line in lines), "}"])


@pytest.mark.parametrize(
    ("line", "num_bytes", "sent", "group"),
    [
        ("all-reduce(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add", 32, 48, 4),
        ("all-to-all(%p), replica_groups=[4,2]<=[8], dimensions={0}", 32, 16, 2),
        ("reduce-scatter(%p), replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%add", 256, 224, 8),
        ("all-gather(%p), replica_groups=mesh['a'=4,'b'=2] {'a':(1)2,'b'}, dimensions={0}", 32, 24, 4),
        ("collective-permute(%p), source_target_pairs={{0,1},{1,0}}", 32, 32, 1),
    ],
)
def test_bytes_of_an_exchange_by_its_group(line, num_bytes, sent, group):
    (found,) = read_collectives(entry(f"%x = f32[8]{{0}} {line}"))
    assert (found.num_bytes, found.sent_bytes, found.group_size) == (num_bytes, sent, group)


@pytest.mark.parametrize(
    ("line", "sizes"),
    [
        ("(f32[1,4]{1,0}, f32[8,4]{1,0}) all-gather-start(%p), dimensions={0}", (32,)),
        ("((f32[1]{0}, f32[2]{0}), (f32[8]{0}, f32[16]{0})) all-gather-start(%p, %q), dimensions={0}", (8, 16)),
        ("(f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,1}}", (4,)),
        ("(f32[4]{0}, bf16[6]{0}) all-reduce-start(%p, %q), to_apply=%add", (4, 6)),
    ],
)
def test_what_begins_has_its_results_and_not_its_operands(line, sizes):
    (found,) = read_collectives(entry(f"%x = {line}"))
    assert found.sizes == sizes


def convolution(shapes, line):
    left, right, out = shapes
    lines = [f"%a = f32[{left}]{{0}} parameter(0)", f"%b = f32[{right}]{{0}} parameter(1)"]
    (found,) = read_products(entry(*lines, f"%c = f32[{out}]{{0}} convolution(%a, %b), {line}"))
    return found.flops


@pytest.mark.parametrize(
    ("shapes", "line", "flops"),
    [
        # Patches of 2 x 2 pixels.
        (("1,4,4,3", "2,2,3,5", "1,2,2,5"), "window={size=2x2 stride=2x2}, dim_labels=b01f_01io->b01f", 2 * 4 * 4 * 15),
        # A window of three over four numbers, padded: the outer places see two of them.
        (("1,4,1", "3,1,1", "1,4,1"), "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", 2 * (2 + 3 + 3 + 2)),
        # A product for each of six heads, as a TPU has it: every place of the window meets its own head alone.
        (
            ("6,7,8", "6,8,9", "6,7,9"),
            "window={size=6 stride=5 pad=0_0 lhs_dilate=6}, dim_labels=0bf_0io->0bf",
            2 * 6 * 7 * 8 * 9,
        ),
    ],
)
def test_a_convolution_counts_where_its_window_lies_on_numbers(shapes, line, flops):
    assert convolution(shapes, line) == flops


def test_a_product_with_a_batch_and_a_loop_that_is_not_known():
    text = "\n".join(
        [
            "%body (p: f32[8]) -> f32[8] {",
            "  %a = f32[3,4,5]{2,1,0} parameter(0)",
            "  %b = f32[3,5,6]{2,1,0} parameter(1)",
            "  %c = f32[3,4,6]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}",
            "}",
            entry("%w = f32[8]{0} while(%p), condition=%gone, body=%body"),
        ]
    )
    program = Program(text)
    (product,) = read_products(program, widest=2)
    assert (product.flops, product.times, program.num_unknown_loops) == (2 * 3 * 4 * 5 * 6, 1, 1)
    assert product.num_bytes == 2 * (math.prod((3, 4, 5)) + math.prod((3, 5, 6)) + math.prod((3, 4, 6)))
    assert program.estimated_cycles() is None
