"""AdamW with warm-up, a learning rate of its own for the value head, and frozen parameters that cost nothing."""

import dataclasses
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from stare_jax.models.policy import Policy
from stare_jax.sharding.mesh import path_name
from stare_jax.types import PyTree, TrainState

VALUE_PARAMS = r"^value"


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """What moves which parameters; paths are `/`-joined and matched by `re.search`."""

    learning_rate: float = 1e-4
    value_learning_rate: float | None = None
    """of the parameters that `value_params` matches; None: the same."""
    value_params: str = VALUE_PARAMS
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    no_decay: str = r"(bias|scale|embedding)"
    """parameters that are not decayed."""
    max_grad_norm: float | None = 1.0
    """bound of the norm of all gradients together."""
    schedule: str = "constant"
    """"constant", or "cosine" or "linear" down to zero: by optimiser steps after the warm-up, in PPO by iterations."""
    warmup_steps: int = 0
    """optimiser steps, in every phase."""
    freeze: tuple[str, ...] = ()
    """regexes of parameters that are not trained: no gradient, no optimiser state."""

    def __post_init__(self):
        for name in (
            "learning_rate",
            "eps",
            *(("value_learning_rate",) if self.value_learning_rate is not None else ()),
        ):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected > 0")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected in [0, 1)")
        for name in ("weight_decay", "warmup_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected >= 0")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm: got {self.max_grad_norm}, expected > 0 or None")
        if self.schedule not in ("constant", "cosine", "linear"):
            raise ValueError(f"schedule: got {self.schedule!r}, expected 'constant', 'cosine' or 'linear'")


def make_optimizer(config: OptimizerConfig, *, num_steps: int | None) -> optax.GradientTransformationExtraArgs:
    """Builds the optimiser of the trainable parameters (`split_params`).

    `update(grads, state, params, train_policy=...)`: where `train_policy` is False only the value head moves, and the
    state of all others stays as it is.

    Args:
        config: see `OptimizerConfig`.
        num_steps: after how many steps the schedule reaches zero; None: it stays constant after the warm-up, and the
            caller scales the updates by `decay_schedule`.
    """

    def adamw(learning_rate):
        return optax.adamw(
            _schedule(config, learning_rate, num_steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree.map_with_path(
                lambda path, _: re.search(config.no_decay, path_name(path)) is None, params
            ),
        )

    def label(params):
        def one(path, _):
            return "value" if re.search(config.value_params, path_name(path)) else "policy"

        return jax.tree.map_with_path(one, params)

    policy = optax.conditionally_mask(
        adamw(config.learning_rate), lambda step, train_policy=True, **_: train_policy, forward_extra_args=True
    )
    value = adamw(config.value_learning_rate or config.learning_rate)
    clip = optax.identity() if config.max_grad_norm is None else optax.clip_by_global_norm(config.max_grad_norm)
    return optax.chain(clip, optax.partition({"policy": policy, "value": value}, label))


def decay_schedule(schedule: str, peak: float, duration: float) -> optax.Schedule:
    """Returns the learning rate as a function of time, from `peak` at 0 along `OptimizerConfig.schedule`.

    Args:
        schedule: see `OptimizerConfig`.
        peak: where it starts.
        duration: when it has reached zero.
    """
    return {
        "constant": lambda: optax.constant_schedule(peak),
        "cosine": lambda: optax.cosine_decay_schedule(peak, duration),
        "linear": lambda: optax.linear_schedule(peak, 0.0, duration),
    }[schedule]()


def _schedule(config: OptimizerConfig, peak: float, num_steps: int | None) -> optax.Schedule:
    if num_steps is None:
        main = optax.constant_schedule(peak)
    else:
        main = decay_schedule(config.schedule, peak, max(num_steps - config.warmup_steps, 1))
    if config.warmup_steps == 0:
        return main
    # Starts at one step's worth, not at zero, so that the first update is not lost.
    warmup = optax.linear_schedule(peak / (config.warmup_steps + 1), peak, config.warmup_steps)
    return optax.join_schedules([warmup, main], [config.warmup_steps])


class AverageState(NamedTuple):
    """State of `keep_average`."""

    inner: PyTree
    average: PyTree
    """of the trainable parameters."""


def keep_average(tx: optax.GradientTransformation, decay: float | None) -> optax.GradientTransformation:
    """Returns an optimiser that also keeps an exponential moving average of the parameters, beginning with the first.

    Args:
        tx: the optimiser; its updates are taken to be applied as they are.
        decay: what remains of the average after a step, in (0, 1); None returns `tx`.
    """
    if decay is None:
        return tx

    def init(params):
        return AverageState(tx.init(params), jax.tree.map(jnp.array, params))

    def update(grads, state, params):
        updates, inner = tx.update(grads, state.inner, params)
        moved = optax.apply_updates(params, updates)
        return updates, AverageState(inner, optax.incremental_update(moved, state.average, 1 - decay))

    return optax.GradientTransformation(init, update)


def averaged_params(state: TrainState, freeze: Sequence[str]) -> PyTree:
    """Returns the parameters with the average of `keep_average` in place of those that are trained."""
    return merge_params(state.opt_state.average, split_params(state.params, freeze)[1])


def frozen_params(policy: Policy, config: OptimizerConfig) -> tuple[str, ...]:
    """Returns the regexes of the parameters that a phase does not train: the model's own, and the phase's."""
    return (*policy.frozen_patterns, *config.freeze)


def split_params(params: PyTree, freeze: Sequence[str]) -> tuple[PyTree, PyTree]:
    """Splits a nested dict of parameters into (trainable, frozen) by the regexes of `frozen_params`.

    Raises:
        ValueError: a regex that matches nothing, or nothing left to train.
    """
    used = set()

    def is_frozen(path):
        hits = {pattern for pattern in freeze if re.search(pattern, path)}
        used.update(hits)
        return bool(hits)

    trainable, frozen = _partition(params, is_frozen, "")
    if unused := sorted(set(freeze) - used):
        raise ValueError(f"freeze: no parameter matches {', '.join(map(repr, unused))}")
    if not jax.tree.leaves(trainable):
        raise ValueError(f"freeze: {', '.join(map(repr, freeze))} leave no parameter to train")
    return trainable, frozen


def merge_params(a: PyTree, b: PyTree) -> PyTree:
    """Joins two nested dicts that have no leaf in common; the inverse of `split_params`."""
    merged = dict(a)
    for name, value in b.items():
        merged[name] = merge_params(merged[name], value) if name in merged else value
    return merged


def _partition(params: PyTree, is_frozen, prefix: str) -> tuple[PyTree, PyTree]:
    trainable, frozen = {}, {}
    for name, value in params.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict):
            parts = _partition(value, is_frozen, f"{path}/")
        else:
            parts = ({}, value) if is_frozen(path) else (value, {})
        for group, part in zip((trainable, frozen), parts, strict=True):
            if not isinstance(part, dict) or part:
                group[name] = part
    return trainable, frozen
