"""Which episodes may use which simulator seeds, so that no phase trains on what another one is judged by.

    evaluation             0 ..  99,999,999
    demonstrations  100,000,000 .. 199,999,999
    pairs           200,000,000 .. 299,999,999
    ppo             300,000,000 .. 399,999,999
    validation      400,000,000 .. 499,999,999

Within a region every run seed (0 .. 99) has a slot of a million seeds, one for each episode in the order of collection.
"""

import zlib

import jax

from stare_jax.config import ConfigError

REGION_SIZE = 100_000_000
SLOT_SIZE = 1_000_000

EVALUATION_SEEDS = 0
DEMO_SEEDS = 1 * REGION_SIZE
PAIR_SEEDS = 2 * REGION_SIZE
PPO_SEEDS = 3 * REGION_SIZE
VALIDATION_SEEDS = 4 * REGION_SIZE


def first_seed(region: int, run_seed: int) -> int:
    """Returns the first simulator seed of a run within a region.

    Args:
        region: one of the constants of this module.
        run_seed: the run's own seed, in [0, 100).

    Raises:
        ValueError: the run seed has no slot in the region.
    """
    num_slots = REGION_SIZE // SLOT_SIZE
    if not 0 <= run_seed < num_slots:
        raise ValueError(f"seed: got {run_seed}, expected 0 <= seed < {num_slots}")
    return region + run_seed * SLOT_SIZE


def take_seeds(region: int, run_seed: int, start: int, count: int) -> range:
    """Returns simulator seeds of a run within a region, one for each of the next episodes.

    Args:
        region: one of the constants of this module.
        run_seed: the run's own seed, in [0, 100).
        start: number of the first episode among all of the run, from 0.
        count: number of episodes.

    Raises:
        ValueError: the run seed has no slot in the region.
        ConfigError: the run has no seeds left; the next ones are those of another run.
    """
    first = first_seed(region, run_seed)
    if start + count > SLOT_SIZE:
        raise ConfigError(
            f"seed: got episodes {start:,} to {start + count:,} of run seed {run_seed}, expected at most {SLOT_SIZE:,} "
            "of one run; go on with another seed"
        )
    return range(first + start, first + start + count)


def region_of(seed: int) -> str:
    """Returns the name of the region that a seed is in."""
    names = {
        EVALUATION_SEEDS: "evaluation",
        DEMO_SEEDS: "demonstrations",
        PAIR_SEEDS: "pairs",
        PPO_SEEDS: "ppo",
        VALIDATION_SEEDS: "validation",
    }
    return names.get(seed // REGION_SIZE * REGION_SIZE, "collection")


def is_for_evaluation(seed: int) -> bool:
    """Says whether a seed is one that policies are judged by."""
    return seed < EVALUATION_SEEDS + REGION_SIZE


def phase_key(seed: int, name: str) -> jax.Array:
    """Returns the root key of the random numbers of a phase, so that no two phases of a run share any.

    Args:
        seed: seed of the run or of the phase's configuration.
        name: name of the phase, or of whatever else draws random numbers.
    """
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
