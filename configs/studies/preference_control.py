"""Figure 5 at our size, with a control: preference on its two tasks, against more imitation of the chosen trajectories.

    python launch/study.py --study=configs/studies/preference_control.py --jobs=2
    python launch/compare.py --study=runs/preference_control --out=results/preference_control

Every method begins from one imitation and learns from 50 pairs of its own. STA-TPO comes with each use of the stage
costs that `losses.sta_tpo_loss` knows: the paper's, "offset" and "relabel". Demonstrations and numbers of a task are
those of configs/studies/franka_state.py and widowx_state.py, so the part of one task can go into the folder of that
study and shares its imitations: --only='LiftPegUpright-v1/*' --workdir=runs/franka_state.
"""

from configs.studies import franka_state, widowx_state
from stare_jax.runs.study import Study, Variant

STACK, LIFT = "StackGreenCubeOnYellowCubeBakedTexInScene-v1", "LiftPegUpright-v1"


def get_study() -> Study:
    """Returns the grid of runs."""
    variants = {f"sta_tpo_{margin}": Variant("sta_tpo", {"tpo.margin": margin}) for margin in ("offset", "relabel")}
    return Study(
        config={STACK: "configs/widowx_state.py:{task},{method}", LIFT: "configs/franka_state.py:{task},{method}"},
        methods=("sft", "grape", "sta_tpo", *variants, "chosen"),
        tasks=(STACK, LIFT),
        seeds=(0, 1, 2, 3, 4),
        task_changes={
            STACK: {"demos.num_demos": widowx_state.NUM_DEMOS},
            LIFT: {"demos.num_demos": franka_state.NUM_DEMOS[LIFT]},
        },
        variants=variants,
    )
