"""Float32 products of the policies are those of float32 on accelerators, too, whose default is fewer bits.

CPUs multiply float32 numbers exactly whatever they are asked for, so the programs are read instead of run.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nano_flow import flow_config
from nano_policy import nano_config, some_stats

from stare_jax.models import LoRAConfig, MLPConfig, make_policy
from stare_jax.models.nn.linear import Execution, Linear

EXACT = (jax.lax.Precision.HIGHEST,) * 2
BFLOAT16 = Execution(dtype="bfloat16", param_dtype="bfloat16")
CONFIGS = {
    "openvla": nano_config(execution=BFLOAT16, lora=LoRAConfig(rank=2)),
    "pi05": flow_config(noise="learned", execution=dataclasses.replace(BFLOAT16, param_dtype="float32")),
    "mlp": MLPConfig(),
}


def products(jaxpr):
    """Every matrix product of a program, those inside its loops and functions included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from products(inner)


def float32_precisions(function, *args):
    """The precision of every product of float32 numbers in a function's program."""
    program = jax.make_jaxpr(function)(*args).jaxpr
    found = [eqn for eqn in products(program) if {x.aval.dtype for x in eqn.invars} == {jnp.dtype("float32")}]
    return [eqn.params["precision"] for eqn in found]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_float32_product_of_a_policy_asks_for_float32(name):
    config = CONFIGS[name]
    policy = make_policy(config, some_stats(config.action_dim, config.state_dim))
    params = jax.eval_shape(policy.init, jax.random.key(0))
    observation = policy.observation_shape(2)

    def decide(params, observation, key):
        return policy.sample(params, observation, key)

    found = float32_precisions(decide, params, observation, jax.random.key(0))
    # The value head at least; in pi0.5 patches, projections, time and deviations as well.
    assert len(found) >= {"openvla": 3, "pi05": 10, "mlp": 6}[name]
    assert set(found) == {EXACT}

    window = () if policy.window is None else (policy.window,)
    action = jax.ShapeDtypeStruct((2, *window, config.action_dim), jnp.float32)
    keys = jax.random.split(jax.random.key(1), 2)

    def loss(params, observation, action):
        return policy.imitation_loss(params, observation, action, key=keys)[0].mean()

    found = float32_precisions(jax.grad(loss), params, observation, action)
    assert set(found) <= {EXACT} and (found or name == "openvla")


@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=2, targets=("",))])
def test_an_exact_layer_is_one_of_float32_in_a_bfloat16_model(lora):
    layer = Linear((4,), BFLOAT16, is_exact=True, lora=lora)
    x = np.ones((2, 3), np.float32)
    out, params = jax.eval_shape(layer.init_with_output, jax.random.key(0), x)
    assert out.dtype == jnp.float32 and params["params"]["kernel"].dtype == jnp.bfloat16
    assert float32_precisions(layer.apply, params, x) == [EXACT] * (1 if lora is None else 3)


def test_a_product_without_a_precision_is_found():
    layer = nn.Dense(4)
    params = jax.eval_shape(layer.init, jax.random.key(0), np.ones((2, 3), np.float32))
    assert float32_precisions(layer.apply, params, np.ones((2, 3), np.float32)) == [None]
