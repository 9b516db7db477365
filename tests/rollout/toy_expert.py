"""The experts of the toys as those of simulators are: one environment's, in NumPy."""

import jax
import numpy as np

from stare_jax.envs.experts.base import Expert


def expert_of_toy(toy):
    def act(signals, memory):
        batch = jax.tree.map(lambda x: np.asarray(x)[None], signals)
        return np.asarray(toy.expert(batch, max_step=toy.max_step))[0], memory

    return Expert(lambda: None, act, (1.0,) * toy.action_dim)
