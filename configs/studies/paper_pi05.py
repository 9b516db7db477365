"""Rows of pi0.5 in table 2 at the paper's size: pi0.5 from images on the four Franka tasks.

    python launch/study.py --study=configs/studies/paper_pi05.py --print > commands.sh      for a cluster's queue
    python launch/compare.py --study=runs/paper_pi05 --out=results/paper_pi05 --baseline=pi_rl

Each policy learns one task, from 100 demonstrations and 50 pairs, with five seeds. The weights of pi0.5 are expected in
weights/pi05 (docs/weights.md). Nobody has run this here: a run wants a node of eight 80 GB accelerators.
"""

from configs.ipi_maniskill import TASKS
from stare_jax.runs.study import Study

WEIGHTS = "weights/pi05"


def get_study() -> Study:
    """Returns the grid of runs."""
    return Study(
        config="configs/ipi_maniskill.py:{task},{method},pi05",
        methods=("sft", "grape", "sta_tpo", "pi_rl", "sta_ppo", "sta_ppo_paper", "ipi"),
        tasks=TASKS,
        seeds=(0, 1, 2, 3, 4),
        init_from=WEIGHTS,
    )
