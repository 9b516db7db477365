"""AdamW with warm-up, a learning rate of its own for the value head, and frozen parameters that cost nothing."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import optax
from annotated_types import Interval

from stare_jax.config import Natural, NonNegative, Pattern, Positive, check_fields
from stare_jax.models.policy import Policy
from stare_jax.sharding.mesh import path_name
from stare_jax.types import PyTree

VALUE_PARAMS = r"^value"

Schedule = Literal["constant", "cosine", "linear"]
_Decay = Annotated[float, Interval(ge=0, lt=1)]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW's settings; paths of parameters are `/`-joined and matched by `re.search`."""

    learning_rate: Positive = 1e-4
    """learning rate after the warm-up."""
    value_learning_rate: Positive | None = None
    """learning rate of the parameters that `value_params` matches; None: the same."""
    value_params: Pattern = VALUE_PARAMS
    """regex of the critic's parameters."""
    b1: _Decay = 0.9
    """decay of the gradient's mean."""
    b2: _Decay = 0.999
    """decay of its square."""
    eps: Positive = 1e-8
    """number that is added to the root of the square."""
    weight_decay: NonNegative = 0.01
    """decay of the parameters, times the learning rate."""
    no_decay: Pattern = r"(bias|scale|embedding)"
    """regex of the parameters that are not decayed."""
    max_grad_norm: Positive | None = 1.0
    """bound of the norm of all gradients that move something, taken together; None: no bound."""
    schedule: Schedule = "constant"
    """course of the learning rate after the warm-up, "cosine" and "linear" down to zero; its time is counted in
    optimiser steps, in PPO in iterations."""
    warmup_steps: Natural = 0
    """optimiser steps, in every phase."""
    freeze: tuple[Pattern, ...] = ()
    """regexes of parameters that are not trained: no gradient, no optimiser state."""

    def __post_init__(self):
        check_fields(self)


def without_critic(config: OptimizerConfig) -> OptimizerConfig:
    """Returns the settings with the critic's parameters frozen."""
    return dataclasses.replace(config, freeze=tuple(dict.fromkeys((*config.freeze, config.value_params))))


def make_optimizer(config: OptimizerConfig, *, num_steps: int | None) -> optax.GradientTransformationExtraArgs:
    """Builds the optimiser of the trainable parameters (`split_params`).

    `update(grads, state, params, train_policy=...)`: where `train_policy` is False only the value head moves, and the
    state of all others stays as it is.

    Args:
        config: see `OptimizerConfig`.
        num_steps: number of steps after which the schedule is zero; None: it stays constant after the warm-up, and the
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
    clip = optax.identity() if config.max_grad_norm is None else _clip_what_moves(config.max_grad_norm, label)
    return optax.chain(clip, optax.partition({"policy": policy, "value": value}, label))


def _clip_what_moves(max_norm: float, label: Callable) -> optax.GradientTransformationExtraArgs:
    """Clips by the norm of all gradients, or of the value head's where it moves alone."""
    clip = optax.clip_by_global_norm(max_norm)

    def update(grads, state, params=None, *, train_policy=True, **_):
        def moving(grad, name):
            return grad if name == "value" else jnp.where(train_policy, grad, 0.0)

        return clip.update(jax.tree.map(moving, grads, label(grads)), state, params)

    return optax.GradientTransformationExtraArgs(clip.init, update)


def decay_schedule(schedule: Schedule, peak: float, duration: float) -> optax.Schedule:
    """Returns the learning rate as a function of time, from `peak` at 0 along `OptimizerConfig.schedule`.

    Args:
        schedule: see `OptimizerConfig`.
        peak: learning rate at time 0.
        duration: time at which it is zero.
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


def frozen_params(policy: Policy, config: OptimizerConfig) -> tuple[str, ...]:
    """Returns the regexes of the parameters that a phase does not train: those of the model and those of the phase."""
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
