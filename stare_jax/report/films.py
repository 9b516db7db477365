"""Films and pictures of an evaluation in a run directory: `videos/`, `figures/timeline_*`, `figures/filmstrip_*`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stare_jax.evaluate.episodes import Episodes
from stare_jax.evaluate.films import Film
from stare_jax.evaluate.protocol import Evaluation
from stare_jax.evaluate.record import evaluation_file, save_evaluation, set_aside_evaluation
from stare_jax.logging import say
from stare_jax.report.figures import draw_timeline
from stare_jax.report.timeline import RewardsFn, trace_episode
from stare_jax.report.video import write_filmstrip, write_video
from stare_jax.stages import TaskSpecs, as_specs


def record_evaluation(
    run_directory: str | Path,
    phase: str,
    evaluation: Evaluation,
    films: Sequence[Film],
    spec: TaskSpecs,
    rewards_of: Sequence[RewardsFn],
    *,
    num_videos: int = 4,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Writes the evaluation of a phase and shows some of its episodes; an earlier one of that name is set aside.

    The numbers are on disk before the first picture is made. Pictures and films that cannot be made are left out, with
    a warning.

    Args:
        run_directory: the directory to write into.
        phase: name of the files.
        evaluation, films: as `evaluate` returned them.
        spec: the task's stages; of several tasks all.
        rewards_of: rewards of training, drawn in the timeline, one function a task.
        num_videos: episodes to film, half successes, half failures; none where films have no frames.
        settings: the configuration of the evaluation, kept with it.

    Raises:
        ConfigError: the phase cannot be a file name.
    """
    run_directory, file = Path(run_directory), evaluation_file(run_directory, phase)
    set_aside_evaluation(run_directory, phase)
    save_evaluation(file, evaluation, phase=phase, settings=settings)
    media: dict[str, Any] = {"videos": []}
    film_of = {film.episode: film for film in films}
    try:
        for index, e in enumerate(telling_episodes(evaluation.episodes, max(1, num_videos))):
            film, seed, task = film_of[e], int(evaluation.episodes.seed[e]), int(evaluation.episodes.task[e])
            one, rewards_fn = as_specs(spec)[task], rewards_of[task]
            timeline = trace_episode(one, film.signals, film.valid, rewards_fn)
            caption = f"{one.env_id}  {phase}  seed {seed}"
            if index == 0:
                picture = f"figures/timeline_{phase}.png"
                draw_timeline(timeline, one.stage_names, run_directory / picture, title=caption)
                media |= {"timeline": picture, "timeline_seed": seed}
            if index == 0 and film.frames is not None:
                picture = f"figures/filmstrip_{phase}.png"
                write_filmstrip(run_directory / picture, film.frames, timeline, one.stage_names, caption=caption)
                media["filmstrip"] = picture
            if index < num_videos and film.frames is not None:
                video = f"videos/{phase}_{index + 1}.mp4"
                write_video(run_directory / video, film.frames, timeline, one.stage_names, caption=caption)
                media["videos"].append({"file": video, "seed": seed, "outcome": _outcome(evaluation.episodes, e)})
    except Exception as error:  # of ffmpeg, Pillow, Matplotlib or the disk: no film is worth the rest of a run
        say(f"warning: {phase}: some of its films and pictures could not be made: {' '.join(str(error).split())}")
    save_evaluation(file, evaluation, phase=phase, settings=settings, media=media)


def telling_episodes(episodes: Episodes, num_episodes: int) -> list[int]:
    """Returns indices of up to `num_episodes` valid episodes, a success first and then in turn while both last.

    Successes and failures are each in the order of the seeds, so nobody has picked the best ones.
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
