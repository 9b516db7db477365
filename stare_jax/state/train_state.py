"""`TrainState`: all that an optimiser step reads and writes; parameters are split once, when a phase starts."""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh

from stare_jax.config import ConfigError
from stare_jax.models.policy import Policy
from stare_jax.sharding.mesh import Rules, path_name, tree_shardings
from stare_jax.state.optimizer import OptimizerConfig, frozen_params, merge_params, split_params
from stare_jax.types import Array, PyTree

CHECKPOINTS = "checkpoints"
"""Name of the folder of checkpoints within a phase's folder."""


@flax.struct.dataclass
class TrainState:
    """All that an optimiser step reads and writes. The two trees of parameters have no leaf in common."""

    step: Array
    """int32 scalar: optimiser steps taken."""
    trainable: PyTree
    """nested dict of the parameters that the optimiser moves, float32."""
    frozen: PyTree
    """nested dict of all other parameters; a step neither copies nor returns them."""
    opt_state: PyTree
    average: PyTree | None = None
    """exponential moving average of `trainable`; None where none is kept."""

    @property
    def params(self) -> PyTree:
        """The nested dict that a policy takes, `trainable` and `frozen` together."""
        return merge_params(self.trainable, self.frozen)

    @property
    def result(self) -> PyTree:
        """The nested dict that a phase ends with: `average`, or `trainable` without one, and `frozen` together."""
        return merge_params(self.trainable if self.average is None else self.average, self.frozen)


def abstract_params(policy: Policy, mesh: Mesh | AbstractMesh) -> PyTree:
    """Returns shapes and shardings of a policy's parameters, without allocating anything."""
    return _with_shardings(jax.eval_shape(policy.init, jax.random.key(0)), mesh, policy.sharding_rules)


def copy_trainable(policy: Policy, params: PyTree, config: OptimizerConfig, mesh: Mesh) -> PyTree:
    """Returns a copy of the parameters that a phase will train, laid out over a mesh as `abstract_params` says."""
    freeze = frozen_params(policy, config)
    to = jax.tree.map(lambda x: x.sharding, split_params(abstract_params(policy, mesh), freeze)[0])
    return jax.tree.map(jnp.copy, jax.device_put(split_params(params, freeze)[0], to))


def abstract_state(
    params: PyTree,
    tx: optax.GradientTransformation,
    *,
    mesh: Mesh | AbstractMesh,
    rules: Rules,
    freeze: Sequence[str] = (),
    has_average: bool = False,
) -> TrainState:
    """Returns shapes and shardings of a train state, without allocating anything.

    Args:
        params: nested dict of arrays or `jax.ShapeDtypeStruct`s.
        tx: see `optimizer.make_optimizer`; it sees the trainable parameters alone.
        mesh: devices of the state.
        rules: see `sharding.mesh.tree_shardings`.
        freeze: see `OptimizerConfig`.
        has_average: whether the state keeps an average.
    """
    trainable, frozen = split_params(params, freeze)
    trainable, frozen = (jax.eval_shape(lambda tree: tree, tree) for tree in (trainable, frozen))
    average = trainable if has_average else None
    step = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(step, trainable, frozen, jax.eval_shape(tx.init, trainable), average)
    return _with_shardings(state, mesh, rules)


def create_state(
    params: PyTree,
    tx: optax.GradientTransformation,
    *,
    mesh: Mesh,
    rules: Rules,
    freeze: Sequence[str] = (),
    has_average: bool = False,
) -> TrainState:
    """Splits parameters and makes the optimiser state; arguments as for `abstract_state`.

    Parameters that are on their devices already are not copied. The first step that is given the state to reuse
    (`train.update.jit_step`) takes the memory of the trainable ones, so that `params` cannot be read afterwards.
    """
    layout = abstract_state(params, tx, mesh=mesh, rules=rules, freeze=freeze, has_average=has_average)
    to = jax.tree.map(lambda x: x.sharding, layout)
    trainable, frozen = split_params(params, freeze)
    # An array of NumPy's may be used in place by a CPU, and is not ours to overwrite.
    trainable = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else np.array(x), trainable)
    trainable, frozen = jax.device_put((trainable, frozen), (to.trainable, to.frozen))
    # Without out_shardings, the moments that tx.init makes under jit end up on one device.
    opt_state = jax.jit(tx.init, out_shardings=to.opt_state)(trainable)
    average = jax.tree.map(jnp.copy, trainable) if has_average else None
    return TrainState(jax.device_put(jnp.int32(0), to.step), trainable, frozen, opt_state, average)


def _with_shardings(shapes: PyTree, mesh: Mesh | AbstractMesh, rules: Rules) -> PyTree:
    shardings = tree_shardings(shapes, mesh, rules)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def check_precision(trainable: PyTree) -> None:
    """Makes sure that trained parameters are float32: small steps would be lost in rounding.

    Raises:
        ConfigError: names one that is not.
    """
    leaves = jax.tree.leaves_with_path(trainable)
    rounded = [path_name(path) for path, leaf in leaves if jnp.dtype(leaf.dtype).itemsize < 4]
    if rounded:
        raise ConfigError(
            f"model.execution.param_dtype: got {len(rounded)} trained parameters of less, {rounded[0]} among "
            "them, expected float32; train adapters (model.lora) or freeze the rest (model.frozen_patterns)"
        )
