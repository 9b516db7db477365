"""Measures the speed of the CPU simulators beside plain ManiSkill, and the parts of a step's time.

It prints three tables. The first steps `gym.make` + `env.step` and this library's simulator in turn, with the same task
and images, one environment in one process each, and compares their states bit by bit. The second is the rate of a pool
of one and of two processes, as a collector sees it. The third divides the time of one environment's steps.

    python benchmarks/simulator.py --json benchmarks/results/simulator_cpu.json
    python benchmarks/simulator.py --tasks PushCube-v1 --seconds 2
"""

import argparse
import contextlib
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from stare_jax.config import home_path
from stare_jax.envs import EnvConfig, execution_noise, make_expert, make_vec_env
from stare_jax.envs.maniskill.building import import_mani_skill
from stare_jax.envs.maniskill.simulator import Simulator
from stare_jax.envs.maniskill.vulkan import select_driver

PANDA, WIDOWX = "PushCube-v1", "PutCarrotOnPlateInScene-v1"
SIZES = {PANDA: ((0, 0), (64, 64), (128, 128), (224, 224)), WIDOWX: ((0, 0), (64, 64), (224, 224), (480, 640))}
"""(height, width) of the images by task; zeros for none."""
COMPARED = (128, 128)
AREAS = {"physics": "_advance", "controller": "_drive", "signals": "_reader.read", "rendering": "_render"}
"""Parts of a step's time, and the method of `Simulator` that each is measured at; the rest is Python around them."""
RESET_EVERY = 30


def config_of(env_id: str, shape: tuple[int, int], workers: int = 1) -> EnvConfig:
    height, width = shape
    return EnvConfig(
        env_id, num_workers=workers, envs_per_worker=1, image_size=height, image_width=width or None, use_state="tcp"
    )


def expert_actions(env_id: str, num_steps: int) -> np.ndarray:
    """Returns actions `[num_steps, A]` of the task's expert with some noise, from the episode of seed 0."""
    simulator, expert = Simulator(config_of(env_id, (0, 0))), make_expert(env_id)
    perturb = execution_noise([0], [0.2], expert.action_scale)
    signals, memory, actions = simulator.reset(0, reproducible=True).signals, expert.init(), []
    for step in range(num_steps):
        action, memory = expert.act(signals, memory)
        actions.append(perturb(action[None], np.array([step == 0]))[0])
        signals = simulator.step(actions[-1]).signals
    simulator.close()
    return np.stack(actions)


# ---- Against plain ManiSkill -----------------------------------------------------------------------------------------


def plain_environment(env_id: str, shape: tuple[int, int]) -> Any:
    """The environment as everybody makes it, with images of the same size by the same shader."""
    height, width = shape
    config, gymnasium = config_of(env_id, shape), import_mani_skill()
    cameras = {"width": width, "height": height, "shader_pack": "minimal"}
    return gymnasium.make(
        env_id,
        num_envs=1,
        robot_uids=config.scene.robot,
        control_mode=config.resolved_control_mode,
        obs_mode="rgb",
        sim_backend="physx_cpu",
        render_backend=select_driver(),
        sensor_configs=cameras,
    )


def compare(env_id: str, shape: tuple[int, int], num_rounds: int) -> dict[str, Any]:
    """Steps both through the same episode in turn.

    Returns:
        Median milliseconds of a step of each, their ratio, and whether all states were equal, bit by bit.
    """
    actions = expert_actions(env_id, RESET_EVERY)
    ours, plain = Simulator(config_of(env_id, shape)), plain_environment(env_id, shape)
    our_ms, plain_ms, is_equal = [], [], True
    for _ in range(num_rounds):
        ours.reset(0, reproducible=True)
        plain.reset(seed=0, options={"reconfigure": True})
        for action in actions:
            start = time.perf_counter()
            ours.step(action)
            middle = time.perf_counter()
            plain.step(action)
            our_ms.append(1e3 * (middle - start))
            plain_ms.append(1e3 * (time.perf_counter() - middle))
            is_equal &= np.array_equal(state_of(ours.env), state_of(plain.unwrapped))
    ours.close()
    plain.close()
    ours_median, plain_median = statistics.median(our_ms), statistics.median(plain_ms)
    return {
        "env_id": env_id,
        "image": list(shape),
        "plain_ms": plain_median,
        "ours_ms": ours_median,
        "ratio": plain_median / ours_median,
        "states_are_equal": bool(is_equal),
    }


def state_of(env: Any) -> np.ndarray:
    """Positions and velocities of the robot's joints and of every actor."""
    robot = env.agent.robot._objs[0]
    poses = [part for actor in env.scene.actors.values() for part in (actor._objs[0].pose.p, actor._objs[0].pose.q)]
    return np.concatenate([robot.qpos, robot.qvel, *poses])


# ---- Pools -----------------------------------------------------------------------------------------------------------


def pool_rate(env_id: str, shape: tuple[int, int], workers: int, seconds: float) -> float:
    """Returns the environment steps per second of a pool, resets included."""
    actions = expert_actions(env_id, RESET_EVERY)
    with contextlib.closing(make_vec_env(config_of(env_id, shape, workers))) as env:
        env.reset(range(env.num_envs))
        for action in actions[:5]:
            env.step(np.tile(action, (env.num_envs, 1)))
        num_steps, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            env.reset(range(env.num_envs))
            for action in actions:
                env.step(np.tile(action, (env.num_envs, 1)))
            num_steps += RESET_EVERY * env.num_envs
        return num_steps / (time.perf_counter() - start)


# ---- One step, taken apart -------------------------------------------------------------------------------------------


def breakdown(env_id: str, shape: tuple[int, int], seconds: float) -> dict[str, float]:
    """Returns the milliseconds of a step in each area, "python" for the rest, "copying" into memory shared with others
    apart from it.
    """
    simulator, actions = Simulator(config_of(env_id, shape)), expert_actions(env_id, RESET_EVERY)
    spent = dict.fromkeys(AREAS, 0.0)
    total, copying, num_steps = 0.0, 0.0, 0
    shared = np.zeros((*simulator.config.image_shape, 3), np.uint8)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        simulator.reset(0)
        timed = {area: _time(simulator, place, spent, area) for area, place in AREAS.items()}
        for action in actions:
            start = time.perf_counter()
            frame = simulator.step(action)
            middle = time.perf_counter()
            if frame.image is not None:
                shared[:] = frame.image
            total, copying = total + middle - start, copying + time.perf_counter() - middle
        for restore in timed.values():
            restore()
        num_steps += len(actions)
    simulator.close()
    parts = spent | {"python": total - sum(spent.values()), "copying": copying}
    return {area: 1e3 * seconds / num_steps for area, seconds in parts.items()}


def _time(simulator: Simulator, place: str, spent: dict[str, float], area: str) -> Callable[[], None]:
    """Adds the time of one of the simulator's parts to `spent[area]`; returns what undoes it."""
    owner, name = simulator, place
    if "." in place:
        outer, name = place.split(".")
        owner = getattr(simulator, outer)
    function, was_own = getattr(owner, name), name in vars(owner)

    def timed(*args: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args)
        finally:
            spent[area] += time.perf_counter() - start

    setattr(owner, name, timed)
    return lambda: setattr(owner, name, function) if was_own else delattr(owner, name)


# ---- Tables ----------------------------------------------------------------------------------------------------------


def name_of(shape: tuple[int, int]) -> str:
    return f"{shape[0]} x {shape[1]}" if shape[0] else "state"


def print_comparison(row: dict) -> None:
    print(f"\n{'one environment':<28}{'image':>10}{'gym.make, ms':>14}{'here, ms':>10}{'ratio':>7}  states")
    states = "equal" if row["states_are_equal"] else "DIFFERENT"
    print(f"{row['env_id']:<28}{name_of(row['image']):>10}{row['plain_ms']:>14.1f}", end="")
    print(f"{row['ours_ms']:>10.1f}{row['ratio']:>7.2f}  {states}")


def print_pools(rows: list[dict]) -> None:
    print(f"\n{'pool of processes':<28}{'image':>10}{'1, steps/s':>12}{'2, steps/s':>12}{'ratio':>7}")
    for row in rows:
        print(
            f"{row['env_id']:<28}{name_of(row['image']):>10}{row['one']:>12.0f}{row['two']:>12.0f}{row['ratio']:>7.2f}"
        )


def print_breakdowns(rows: list[dict]) -> None:
    areas = (*AREAS, "python", "copying")
    print(f"\n{'milliseconds of a step':<28}{'image':>10}" + "".join(f"{area:>12}" for area in areas))
    for row in rows:
        parts = "".join(f"{row['ms'][area]:>12.2f}" for area in areas)
        print(f"{row['env_id']:<28}{name_of(row['image']):>10}{parts}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=SIZES, default=list(SIZES), metavar="ENV_ID", help="(both)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement (%(default)s)")
    parser.add_argument("--json", type=home_path, metavar="PATH", help="also write the result there")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # ManiSkill's own
    result: dict[str, Any] = {"command": f"python benchmarks/simulator.py --seconds {args.seconds:g}"}
    result["machine"] = {"cores": os.cpu_count(), "load_average": os.getloadavg(), "jax": jax.__version__}
    pools, parts = [], []
    for env_id in args.tasks:
        for shape in SIZES[env_id]:
            one, two = (pool_rate(env_id, shape, workers, args.seconds) for workers in (1, 2))
            pools.append({"env_id": env_id, "image": list(shape), "one": one, "two": two, "ratio": two / one})
            parts.append({"env_id": env_id, "image": list(shape), "ms": breakdown(env_id, shape, args.seconds)})
    comparison = compare(PANDA, COMPARED, num_rounds=max(1, round(args.seconds)))
    print_comparison(comparison)
    print_pools(pools)
    print_breakdowns(parts)
    if args.json:
        result |= {"comparison": comparison, "pools": pools, "breakdown": parts}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
