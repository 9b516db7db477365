"""The check of what a program exchanges finds each kind of fault, in programs of a few lines."""

import pytest
from collectives import is_of_token, moved_out, not_zero3, numbers_of_token

from stare_jax.plan.exchanges import read_collectives

LAYER = "jit(f)/llm.run/while/body/closed_call/layers/up_proj/dot_general"
HEAD = "jit(f)/llm.logits/lm_head/dot_general"
LEAVES = (
    ("params/llm/layers/up_proj/kernel", (2, 8, 16), True),
    ("params/llm/layers/norm/scale", (2, 8), False),
    ("params/projector/fc1/kernel", (8, 24), True),
    ("params/llm/lm_head/kernel", (8, 512), True),
)
GATHER = ("all-gather", "8,16", LAYER)
SUM = ("all-reduce", "8", LAYER)
COLUMNS = ("all-gather", "8,256", HEAD)


def program(in_loop, outside):
    """XLA's text of a loop and what is outside of it; each operation is (kind, shape, source)."""

    def lines(operations, prefix):
        return [
            f'  %{prefix}.{i} = f32[{shape}]{{0}} {kind}(%p), metadata={{op_name="{source}"}}'
            for i, (kind, shape, source) in enumerate(operations)
        ]

    body = ["%body (p: f32[8]) -> f32[8] {", *lines(in_loop, "inner"), "}"]
    loop = "  ROOT %while.1 = f32[8]{0} while(%p), condition=%cond, body=%body"
    return "\n".join([*body, "", "ENTRY %main (p: f32[8]) -> f32[8] {", *lines(outside, "outer"), loop, "}"])


def problems(in_loop, outside):
    return not_zero3(read_collectives(program(in_loop, outside)), LEAVES, {"llm": 1})


def test_weights_of_one_layer_at_a_time_are_fine():
    assert problems([GATHER, SUM], [COLUMNS]) == []


@pytest.mark.parametrize(
    ("in_loop", "outside", "message"),
    [
        ([GATHER], [("all-gather", "2,8,16", LAYER)], "moved out of its loop"),
        ([], [GATHER], "moved out of its loop"),
        (
            [GATHER],
            [("all-reduce", "8", LAYER.replace("layers/up_proj", "(layers/a:layers/b)"))],
            "moved out of its loop",
        ),
        ([("all-gather", "2,8,16", LAYER)], [], "not weights of a layer"),
        ([GATHER, ("all-gather", "4,16", LAYER)], [], "not weights of a layer: all-gather of (64,)"),
        ([GATHER, ("all-reduce", "4,16", LAYER)], [], "not weights of a layer: all-reduce of (64,)"),
        # As large as weights, but weights are never moved like this.
        ([GATHER, ("all-to-all", "8,16", LAYER)], [], "not weights of a layer: all-to-all"),
        ([GATHER], [("all-to-all", "8,256", HEAD)], "not weights: all-to-all"),
        ([GATHER], [("all-gather", "2,3,256", HEAD)], "not weights: all-gather of (1536,)"),
        # 24 x 256 numbers are columns of no output layer, though another product has 24 outputs.
        ([GATHER], [("all-gather", "8,3,256", HEAD)], "not weights: all-gather of (6144,)"),
        ([], [], "llm: 1 gathers too few of 128 elements"),
        ([GATHER, GATHER], [], "llm: -1 gathers too few of 128 elements"),
    ],
)
def test_every_other_exchange_is_found(in_loop, outside, message):
    found = problems(in_loop, outside)
    assert any(problem.startswith(message) for problem in found), found


def test_exchanges_of_a_token_are_counted_in_the_loop_over_tokens_alone():
    token = "jit(sample)/while/body/closed_call/decode"
    layer = f"{token}/while/body/layers/(q_proj/dot_general:k_proj/dot_general)"
    read = read_collectives(program([("all-reduce", "4,8", token)], [("all-gather", "8,16", LAYER)]))
    assert [is_of_token(one) for one in read] == [True, False]
    read = [one._replace(trips=(6, 3), source=layer, num_loops=2) for one in read[:1]]
    assert numbers_of_token(read) == 3 * 32


def test_what_is_moved_out_is_found_on_any_mesh():
    assert len(moved_out(read_collectives(program([GATHER], [GATHER, COLUMNS])))) == 1
