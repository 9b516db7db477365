"""What an evaluation leaves in a run directory: `eval/<phase>.json`, films, and pictures of one episode."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from stare_jax.evaluate.protocol import Episodes, Evaluation
from stare_jax.evaluate.summary import save_evaluation
from stare_jax.logging import say
from stare_jax.report.figures import draw_timeline
from stare_jax.report.timeline import trace_episode
from stare_jax.report.video import write_filmstrip, write_video
from stare_jax.rollout.collect import Rollout
from stare_jax.stages import TaskSpec


def evaluation_file(run_directory: str | Path, phase: str) -> Path:
    """Returns where the evaluation of a phase is kept: `eval/<phase>.json`.

    Raises:
        ValueError: the phase cannot be a file name.
    """
    if not re.fullmatch(r"[\w-]+", phase):
        raise ValueError(f"phase: got {phase!r}, expected letters, digits, '_' and '-'")
    return Path(run_directory) / "eval" / f"{phase}.json"


def record_evaluation(
    run_directory: str | Path,
    phase: str,
    evaluation: Evaluation,
    rollout: Rollout,
    spec: TaskSpec,
    *,
    num_videos: int = 4,
    gamma: float = 0.99,
    camera: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Writes the evaluation of a phase and shows some of its episodes; replaces an earlier one of that phase.

    Pictures and films that cannot be made are left out, with a warning.

    Args:
        run_directory: where to.
        phase: names the files; letters, digits, `_`, `-`.
        evaluation, rollout: as `evaluate` returned them.
        spec: the task's stages.
        num_videos: episodes to film, half successes, half failures; none where no images were kept.
        gamma: discount of the shaped reward in the timeline.
        camera: whose images; None takes the first by name.
        settings: the configuration of the evaluation, kept with it.

    Raises:
        ValueError: the phase cannot be a file name.
    """
    run_directory, result_file = Path(run_directory), evaluation_file(run_directory, phase)
    trajectory, episodes = rollout.trajectory, evaluation.episodes
    images = trajectory.observation.images
    frames = images[camera if camera is not None else min(images)] if images else None
    media: dict[str, Any] = {"settings": settings, "videos": []}
    save_evaluation(result_file, evaluation, phase=phase, **media)  # before anything that could fail
    try:
        for index, e in enumerate(telling_episodes(episodes, max(1, num_videos))):
            signals, seed = jax.tree.map(lambda field, e=e: field[e], trajectory.signals), int(episodes.seed[e])
            timeline = trace_episode(spec, signals, trajectory.valid[e], gamma=gamma)
            caption = f"{spec.env_id}  {phase}  seed {seed}"
            if index == 0:
                file = f"figures/timeline_{phase}.png"
                draw_timeline(timeline, spec.stage_names, run_directory / file, title=caption)
                media |= {"timeline": file, "timeline_seed": seed}
            if index == 0 and frames is not None:
                file = f"figures/filmstrip_{phase}.png"
                write_filmstrip(run_directory / file, frames[e], timeline, spec.stage_names, caption=caption)
                media["filmstrip"] = file
            if index < num_videos and frames is not None:
                file = f"videos/{phase}_{index + 1}.mp4"
                write_video(run_directory / file, frames[e], timeline, spec.stage_names, caption=caption)
                media["videos"].append({"file": file, "seed": seed, "outcome": _outcome(episodes, e)})
    except Exception as error:  # of ffmpeg, Pillow, Matplotlib or the disk: no film is worth the rest of a run
        say(f"warning: {phase}: some of its films and pictures could not be made: {' '.join(str(error).split())}")
    save_evaluation(result_file, evaluation, phase=phase, **media)


def telling_episodes(episodes: Episodes, num_episodes: int) -> list[int]:
    """Returns indices of up to `num_episodes` valid episodes, a success first and then in turn while both last.

    Within successes and failures the order is that of the seeds, so nobody has picked the best ones.
    """
    successes = np.flatnonzero(episodes.valid & episodes.success_once).tolist()
    failures = np.flatnonzero(episodes.valid & ~episodes.success_once).tolist()
    num_failures = min(len(failures), max(num_episodes // 2, num_episodes - len(successes)))
    chosen_failures, chosen = failures[:num_failures], []
    for success in successes[: num_episodes - num_failures]:
        chosen += [success, *chosen_failures[:1]]
        chosen_failures = chosen_failures[1:]
    return chosen + chosen_failures


def _outcome(episodes: Episodes, e: int) -> str:
    if not episodes.success_once[e]:
        return "failure"
    return "success" if episodes.success_end[e] else "success, lost again by the end"
