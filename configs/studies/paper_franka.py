"""Table 2 and figures 4 to 6 at the paper's size: OpenVLA-7B from images on the four Franka tasks.

    python launch/study.py --study=configs/studies/paper_franka.py --print > commands.sh      for a cluster's queue
    python launch/compare.py --study=runs/paper_franka --out=results/paper_franka

Each policy learns one task, from 100 demonstrations and 50 pairs, with five seeds. The weights of OpenVLA-7B are
expected in weights/openvla-7b (docs/weights.md). The toggles of figure 6 are on two tasks. Nobody has run
this here: a run wants a node of eight 80 GB accelerators.
"""

from configs.ipi_maniskill import TASKS
from configs.studies.franka_toggles import TASKS as TOGGLED
from configs.studies.franka_toggles import TOGGLES
from stare_jax.runs.study import Study

WEIGHTS = "weights/openvla-7b"


def get_study() -> Study:
    """Returns the grid of runs."""
    without = [(task, name) for task in TASKS if task not in TOGGLED for name in TOGGLES]
    return Study(
        config="configs/ipi_maniskill.py:{task},{method}",
        methods=("sft", "grape", "sta_tpo", "ppo", "rl4vla", "sta_ppo", "sta_ppo_paper", "ipi", *TOGGLES),
        tasks=TASKS,
        seeds=(0, 1, 2, 3, 4),
        changes={"model.tokenizer": WEIGHTS},
        # RL4VLA's reward pays for a grasp, which nobody makes of a cube that is pushed.
        without=(("PushCube-v1", "rl4vla"), ("PullCube-v1", "rl4vla"), *without),
        variants=TOGGLES,
        init_from=WEIGHTS,
    )
