"""Table 1 and figures 4 and 5 at the paper's size: OpenVLA-7B from images on the four WidowX tasks.

    python launch/study.py --study=configs/studies/paper_widowx.py --print > commands.sh      for a cluster's queue
    python launch/compare.py --study=runs/paper_widowx --out=results/paper_widowx

Each policy learns one task, from 100 demonstrations and 50 pairs, with five seeds. The weights of OpenVLA-7B are
expected in weights/openvla-7b (docs/weights.md). Nobody has run this here: a run wants a node of eight
80 GB accelerators.
"""

from configs.ipi_widowx import TASKS
from stare_jax.runs.study import Study

WEIGHTS = "weights/openvla-7b"


def get_study() -> Study:
    """Returns the grid of runs."""
    return Study(
        config="configs/ipi_widowx.py:{task},{method}",
        methods=("sft", "grape", "sta_tpo", "chosen", "ppo", "rl4vla", "sta_ppo", "sta_ppo_paper", "ipi"),
        tasks=TASKS,
        seeds=(0, 1, 2, 3, 4),
        changes={"model.tokenizer": WEIGHTS},
        init_from=WEIGHTS,
    )
