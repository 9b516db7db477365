"""The optimiser steps: what is cut into microbatches adds up, padding does nothing, frozen stays frozen."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stare_jax.envs import toy
from stare_jax.rollout.collect import collect_episodes, policy_act
from stare_jax.train.optimizer import OptimizerConfig, make_optimizer
from stare_jax.train.ppo import PPOConfig, make_prepare, minibatches
from stare_jax.train.sft import SFTConfig
from stare_jax.train.sharding import make_mesh
from stare_jax.train.state import create_state
from stare_jax.train.steps import SFTBatch, make_ppo_step, make_sft_step, make_tpo_step
from stare_jax.train.tpo import TPOConfig, score_pairs

from conftest import demonstrations, random_pairs
