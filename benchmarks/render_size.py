"""Measures what it costs to draw images large and make them smaller, and how far they are from those drawn small.

Both are drawn of the same states of an expert's episode, in turn. Times are those of the processor, on all its cores.

    python benchmarks/render_size.py --task=PutCarrotOnPlateInScene-v1 --image-size=224 --render-size=480
"""

import argparse
import contextlib
import dataclasses
import statistics
import time
import warnings
from collections.abc import Iterator

import numpy as np

from stare_jax.envs import EnvConfig, make_expert
from stare_jax.envs.maniskill.shrinking import shrink
from stare_jax.envs.maniskill.simulator import Simulator


def images(small: Simulator, large: Simulator, num_states: int) -> Iterator[tuple[Simulator, np.ndarray, float]]:
    """Yields images as they are drawn in each state, first of `small` and then of `large`, and the seconds it took."""
    expert = make_expert(small.config.env_id)
    memory = expert.init()
    frames = [simulator.reset(0, reproducible=True) for simulator in (small, large)]
    for _ in range(num_states):
        action, memory = expert.act(frames[0].signals, memory)
        frames = [simulator.step(action, is_drawn=False) for simulator in (small, large)]
        for simulator in (small, large):
            start = time.process_time()
            image = simulator._render()
            yield simulator, image, time.process_time() - start


def compare(config: EnvConfig, num_states: int) -> dict[str, float]:
    """Returns medians of milliseconds, and the mean and largest differences in grey levels."""
    ms: dict[str, list[float]] = {"small": [], "large": [], "shrink": []}
    differences = []
    with contextlib.ExitStack() as stack:
        small, large = Simulator(dataclasses.replace(config, render_size=0)), Simulator(config)
        stack.callback(small.close)
        stack.callback(large.close)
        for simulator, image, seconds in images(small, large, num_states):
            if simulator is small:
                drawn_small = image
                ms["small"].append(1e3 * seconds)
                continue
            start = time.process_time()
            shrunk = shrink(image, config.image_shape, config.resize)
            ms["shrink"].append(1e3 * (time.process_time() - start))
            ms["large"].append(1e3 * seconds)
            differences.append(np.abs(shrunk.astype(int) - drawn_small))
    found = {name: statistics.median(times) for name, times in ms.items()}
    edges = statistics.mean(float(np.percentile(difference, 99)) for difference in differences)
    return found | {"mean": float(np.mean(differences)), "edges": edges, "largest": float(np.max(differences))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--task", default="PushCube-v1", help="(%(default)s)")
    add("--image-size", type=int, default=64, help="pixels, of a square (%(default)s)")
    add("--render-size", type=int, default=256, help="pixels, height as drawn (%(default)s)")
    add("--resize", default="lanczos3", help="(%(default)s)")
    add("--states", type=int, default=20, help="of the episode (%(default)s)")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # ManiSkill's own
    config = EnvConfig(args.task, image_size=args.image_size, render_size=args.render_size, resize=args.resize)
    found = compare(config, args.states)
    (height, width), (drawn_height, drawn_width) = config.image_shape, config.drawn_shape
    print(f"{args.task}, milliseconds of the processor for an image:")
    print(f"drawn {height} x {width}: {found['small']:.1f}")
    print(f"drawn {drawn_height} x {drawn_width}: {found['large']:.1f}; {args.resize}: {found['shrink']:.1f}")
    levels = f"mean {found['mean']:.2f}, 99 % up to {found['edges']:.0f}, all up to {found['largest']:.0f}"
    print(f"grey levels between them: {levels}")


if __name__ == "__main__":
    main()
