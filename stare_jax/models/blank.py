"""Policies whose data set does not matter: their parameters and prompts are those of any other of the same model."""

import dataclasses
import functools
from collections.abc import Collection, Mapping

import jax
from flax.traverse_util import flatten_dict

from stare_jax.models import ModelConfig, Policy, make_policy
from stare_jax.models.normalize import identity_stats


def blank_policy(config: ModelConfig) -> Policy:
    """Builds the policy of a model under statistics that scale nothing."""
    return make_policy(config, identity_stats(config.action_dim, config.state_dim))


def init_leaves(config: ModelConfig, key: jax.Array, paths: Collection[str]) -> dict[str, jax.Array]:
    """Returns initial values of the leaves at some paths, without allocating the rest of the model.

    The key is consumed.
    """
    if not paths:
        return {}

    def init(key):  # what is not returned is not computed
        params = flatten_dict(blank_policy(config).init(key), sep="/")
        return {path: params[path] for path in paths}

    return jax.jit(init)(key)


def leaf_shapes(config: ModelConfig) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Returns shape and dtype of every leaf of a model's parameters, by path, without allocating it."""
    return _leaf_shapes(dataclasses.replace(config, tokenizer=""))  # which differs from folder to folder


@functools.lru_cache(maxsize=16)
def _leaf_shapes(config: ModelConfig) -> Mapping[str, jax.ShapeDtypeStruct]:
    return flatten_dict(jax.eval_shape(blank_policy(config).init, jax.random.key(0)), sep="/")
