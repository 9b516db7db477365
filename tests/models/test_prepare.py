"""Parameters that are prepared for a rollout: a decision is the same, and neither casts nor moves a weight."""

import collections
import re

import jax
import jax.numpy as jnp
import nano_flow
import numpy as np
import pytest
from nano_policy import INSTRUCTIONS, jit, nano_config, random_observation, some_stats

from stare_jax.models import PI05_EXPERTS, LoRAConfig, LoRAOverride, MLPConfig, make_policy
from stare_jax.models.nn.linear import Execution
from stare_jax.plan.text import Program
from stare_jax.rollout.prepared import prepare_params
from stare_jax.sharding.mesh import path_name

WIDE = Execution(dtype="bfloat16", param_dtype="float32")
CONFIGS = {
    "openvla": nano_config(execution=WIDE),
    "openvla, adapters, apart": nano_config(execution=WIDE, lora=LoRAConfig(rank=2), unstack_layers=True),
    "pi05, apart": nano_flow.flow_config(noise="learned", execution=WIDE),
    "pi05, adapters, apart": nano_flow.flow_config(execution=WIDE, lora=LoRAConfig(rank=2, targets=PI05_EXPERTS)),
    "pi05": nano_flow.flow_config(execution=WIDE, unstack_layers=False),
    "mlp": MLPConfig(),
}
CAST, SLICED = "convert_element_type", "scan"
MOVES = {CAST, SLICED, "transpose", "slice", "dynamic_slice", "copy", "gather"}
"""primitives that write a weight anew, or a part of it; a scan does so with each layer of a stack"""
VECTORS = r"(?i)norm\w*/(scale|bias)$|(pos_embed|pos_embedding|cls_token|reg_token)$"
"""what is no weight of a product, and in float32 in parts"""
LEFT = (
    (r"(embed_tokens|input_embedding)$", {"gather"}),  # rows of tokens
    (r"^llm/lm_head/(kernel|lora_b)$", {"slice"}),  # columns of the action's tokens
    # Stacks whose layers read many tokens once, and two weights in one.
    (r"^(dino|siglip)/blocks/|^PaliGemma/img/.*encoderblock/", {SLICED}),
    (r"^PaliGemma/llm/layers/", {SLICED, "slice", "transpose"}),
    (r"^expert_layers/.*lora_[ab]$", {"slice", "transpose"}),  # small
)
"""regex -> what decisions still do with such leaves."""


def note_uses(jaxpr, leaf_of, found):
    """Adds to `found` the primitives that take each leaf, or what has become of it, and the types they cast to."""
    for eqn in jaxpr.eqns:
        inner = [getattr(x, "jaxpr", x) for x in eqn.params.values() if hasattr(getattr(x, "jaxpr", x), "eqns")]
        given = [None if hasattr(x, "val") else leaf_of.get(x) for x in eqn.invars]
        if inner:
            if eqn.primitive.name == SLICED:
                for leaf in filter(None, given[eqn.params["num_consts"] + eqn.params["num_carry"] :]):
                    found[leaf].append((SLICED, None))
            known = {x: leaf for x, leaf in zip(inner[0].invars, given, strict=True) if leaf is not None}
            note_uses(inner[0], known, found)
            continue
        for leaf in filter(None, given):
            found[leaf].append((eqn.primitive.name, eqn.params.get("new_dtype")))
            if eqn.primitive.name in {"reshape", "squeeze", "transpose", "slice", "dynamic_slice", "copy"}:
                leaf_of[eqn.outvars[0]] = leaf


def uses_of_leaves(policy, params):
    """Returns what a decision does with each parameter: path -> (primitive, type that it casts to)."""
    inputs = (params, policy.observation_shape(2), jax.random.key(0))
    program = jax.make_jaxpr(lambda *inputs: policy.sample(*inputs))(*inputs).jaxpr
    paths, found = list(by_path(params)), collections.defaultdict(list)
    note_uses(program, dict(zip(program.invars, paths, strict=False)), found)
    return found


def by_path(params):
    return {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_decision_casts_and_moves_no_weight(name):
    config = CONFIGS[name]
    policy = make_policy(config, some_stats(config.action_dim, config.state_dim))
    params = jax.eval_shape(policy.init, jax.random.key(0))
    prepared = jax.eval_shape(policy.prepare, params)
    left = (*LEFT, *([] if "apart" in name else [("^llm/layers/", {SLICED})]))
    for path, found in uses_of_leaves(policy, prepared).items():
        allowed = set().union(*(primitives for pattern, primitives in left if re.search(pattern, path)))
        moves = {primitive for primitive, _ in found} & MOVES
        assert moves <= allowed or re.search(VECTORS, path), (path, moves)
    # What is cast would be cast before anything is computed with it, so that no number changes.
    before, leaves = uses_of_leaves(policy, params), by_path(params)
    changed = [path for path, leaf in by_path(prepared).items() if path in leaves and leaf.dtype != leaves[path].dtype]
    assert bool(changed) == (name != "mlp")
    for path in changed:
        computed = {use for use in before[path] if use[0] not in MOVES - {CAST} | {"reshape", "squeeze"}}
        assert computed == {(CAST, jnp.dtype(by_path(prepared)[path].dtype))}, (path, before[path])


def copies_of_weights(compiled, shapes):
    """Returns the instructions of denoising steps that write an array of one of the shapes, axes of 1 left out."""
    opcodes = {"copy", "slice", "dynamic-slice", "transpose", "convert"}
    found = [one for one, _, _ in Program(compiled.as_text()).walk() if one.opcode in opcodes]
    return [
        one.line
        for one in found
        if "Pi05.suffix" in one.source and any(without_ones(x.shape) in shapes for x in one.results)
    ]


def without_ones(shape):
    return tuple(size for size in shape if size > 1)


def test_a_compiled_decision_is_the_same_and_copies_no_weight_of_layers_apart():
    overrides = (LoRAOverride("_1(/|$)", rank=3, alpha=6.0),)  # by path, which layers apart have to know
    lora = LoRAConfig(rank=2, targets=PI05_EXPERTS, overrides=overrides)
    policy = make_policy(nano_flow.flow_config(noise="learned", lora=lora), some_stats(3, 2))
    params = jax.device_put(nano_flow.random_params(policy))
    prepared, observation = prepare_params(policy, params), random_observation(policy, INSTRUCTIONS[:2])
    inputs = [(given, observation, jax.random.key(1)) for given in (params, prepared)]
    programs = [jit(policy.sample).lower(*given).compile() for given in inputs]
    expected, found = (program(*given) for program, given in zip(programs, inputs, strict=True))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), found, expected)
    stacked = {path: leaf[0] for path, leaf in by_path(params).items() if re.search(r"layers/.*_1/", path)}
    weights = [*stacked.items(), *by_path(prepared["expert_layers"][0]).items()]
    shapes = {without_ones(x.shape) for path, x in weights if x.ndim > 1 and "lora" not in path}
    before, after = (copies_of_weights(program, shapes) for program in programs)
    assert len(before) >= 7 and after == []


def test_what_needs_nothing_is_the_same_array_and_prepared_parameters_are_as_they_are():
    config = CONFIGS["openvla, adapters, apart"]
    policy = make_policy(config, some_stats(config.action_dim, config.state_dim))
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(policy.init, jax.random.key(0)))
    prepared = prepare_params(policy, params)
    is_same = {path: leaf is by_path(params).get(path) for path, leaf in by_path(prepared).items()}
    moved = {path for path, same in is_same.items() if not same}
    assert moved == {path for path in is_same if path.startswith("llm/layers/") or path.endswith(("lora_a", "lora_b"))}
    assert all(x is y for x, y in zip(*map(jax.tree.leaves, (prepare_params(policy, prepared), prepared)), strict=True))
