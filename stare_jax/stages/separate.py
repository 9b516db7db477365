"""Stage separator (section 4.1): when each stage ends, and so the label of every state.

Stage k, 0-based, ends when its terminal event e_k first holds after stage k-1 has ended:

    c_{-1} = 0,    c_k = min{t >= c_{k-1} : e_k(t)},    g(t) = min(K-1, #{k : c_k <= t})

so the state in which the event holds already belongs to the next stage, several stages may end in one step, and labels
never decrease. Success ends all stages that are left.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from stare_jax.stages import measures
from stare_jax.stages.spec import StageParams, TaskSpec
from stare_jax.types import Array, Signals


class StageCarry(NamedTuple):
    """Memory of the online separator from one state to the next."""

    num_completed: Array
    """int32 scalar in 0 .. K: stages completed so far; a number is enough because stages are completed in order."""


class Separation(NamedTuple):
    """The stages of one trajectory."""

    stage_t: Array
    """int32 `[T]` g(t) in 0 .. K-1; steps that do not exist keep the last label."""
    completed: Array
    """bool `[K]`: c_k is finite."""
    entered_at: Array
    """int32 `[K]` first existing t with label k; T where there is none, also where the stage was skipped."""


def init_stage(spec: TaskSpec, signals_0: Signals) -> StageCarry:
    """Returns the separator's state before any state of the episode has been seen.

    Args:
      spec: the task.
      signals_0: the episode's first state; only its shapes are read, the first `step_stage` is with it.
    """
    del spec
    measures.as_signals(signals_0, ())
    return StageCarry(num_completed=jnp.zeros((), jnp.int32))


def step_stage(
    spec: TaskSpec, carry: StageCarry, signals_t: Signals, *, valid_t: Array | bool = True
) -> tuple[StageCarry, Array]:
    """Labels the next state of an episode (section 4.1).

    Args:
      spec: the task.
      carry: of `init_stage` or the previous call.
      signals_t: one state.
      valid_t: bool scalar, whether the state exists; one that does not completes nothing and keeps the last label.

    Returns:
      The new carry, and the label g(t), int32 scalar in 0 .. K-1.
    """
    signals_t = measures.as_signals(signals_t, ())
    chex.assert_shape(carry.num_completed, (), custom_message="carry.num_completed")
    num_stages = spec.num_stages
    event = jnp.stack([event_fn(spec.params, signals_t) for event_fn in spec.event_fns])
    ended = event | (jnp.arange(num_stages) < carry.num_completed)
    # A stage has ended by now only if all the stages before it have.
    num_completed = jnp.sum(jnp.cumprod(ended.astype(jnp.int32)), dtype=jnp.int32)
    num_completed = jnp.where(signals_t.success, num_stages, num_completed)
    num_completed = jnp.where(valid_t, num_completed, carry.num_completed)
    return StageCarry(num_completed), jnp.minimum(num_completed, num_stages - 1)


def separate(spec: TaskSpec, signals: Signals, valid: Array | None = None) -> Separation:
    """Labels a whole trajectory: `step_stage` scanned over its states (section 4.1).

    Args:
      spec: the task.
      signals: leaves `[T, ...]`, from the episode's first state on.
      valid: bool `[T]` which states exist, a prefix; None for all.

    Returns:
      `Separation`, labels `[T]`, completion and entry times `[K]`.
    """
    num_states = measures.num_states(signals)
    signals = measures.as_signals(signals, (num_states,))
    valid = measures.as_valid(valid, num_states)

    def step(carry, inputs):
        signals_t, valid_t = inputs
        return step_stage(spec, carry, signals_t, valid_t=valid_t)

    start = init_stage(spec, jax.tree.map(lambda leaf: leaf[0], signals))
    last, stage_t = jax.lax.scan(step, start, (signals, valid))
    stages = jnp.arange(spec.num_stages, dtype=jnp.int32)
    in_stage = (stage_t == stages[:, None]) & valid
    entered_at = jnp.where(in_stage.any(axis=1), jnp.argmax(in_stage, axis=1), num_states)
    return Separation(stage_t, stages < last.num_completed, entered_at.astype(jnp.int32))


def stage_mask(separation: Separation, num_stages: int, valid: Array | None = None) -> Array:
    """Returns which existing steps belong to which stage, bool `[K, T]`.

    Args:
      separation: of a trajectory of T states.
      num_stages: K.
      valid: bool `[T]` which states exist; None for all. For actions, which belong to the state they are taken in, cut
        the last column and keep the columns of existing actions: `stage_mask(...)[:, :-1] & valid[1:]`.
    """
    chex.assert_rank(separation.stage_t, 1, custom_message="separation.stage_t")
    chex.assert_type(separation.stage_t, int, custom_message="separation.stage_t")
    chex.assert_shape(separation.completed, (num_stages,), custom_message="separation.completed")
    valid = measures.as_valid(valid, separation.stage_t.shape[0])
    return (separation.stage_t == jnp.arange(num_stages)[:, None]) & valid


# Terminal events, (params, checked signals of one state) -> bool.


def reached(params: StageParams, signals: Signals) -> Array:
    """Returns whether the robot touches the object or is closer to it than `delta_reach`."""
    return signals.is_contact | (measures.reach_distance(signals) < params.delta_reach)


def touched(params: StageParams, signals: Signals) -> Array:
    """Returns whether the robot touches the object."""
    del params
    return signals.is_contact


def grasped(params: StageParams, signals: Signals) -> Array:
    """Returns whether both fingers hold the object."""
    del params
    return signals.is_grasped


def grasped_and_lifted(params: StageParams, signals: Signals) -> Array:
    """Returns whether both fingers hold the object more than `delta_lift` above its support."""
    return signals.is_grasped & (measures.height(signals) > params.delta_lift)


def lifted(params: StageParams, signals: Signals) -> Array:
    """Returns whether the object is more than `h_min` above its support."""
    return measures.height(signals) > params.h_min


def near_goal(params: StageParams, signals: Signals) -> Array:
    """Returns whether the object is horizontally closer to its goal than `delta_goal`."""
    return measures.horizontal_goal_distance(signals) < params.delta_goal


def succeeded(params: StageParams, signals: Signals) -> Array:
    """Returns the environment's own success flag."""
    del params
    return signals.success
