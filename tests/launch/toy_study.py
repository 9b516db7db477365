"""A study of real processes on the toy: `python toy_study.py study ...` is launch/study.py, its runs are this file."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "launch"), str(ROOT / "tests" / "runs")]


def get_config(method: str = "ppo"):
    """The configuration of a run of one of the methods, of a few optimiser steps."""
    import toy_run

    from configs.methods import set_method
    from configs.presets import base_config
    from stare_jax.config import to_dict

    small = toy_run.make_config()
    config = base_config(small.env, small.model, name="toy")
    for section in ("demos", "sft", "pairs", "tpo", "ppo", "evaluation"):
        values = to_dict(getattr(small, section))
        values.pop("seed", None)  # it follows the run's
        config[section].update(values)
    config.ppo.num_iterations = NUM_ITERATIONS
    config.ppo.keep_checkpoints = 1
    config.logging.tensorboard = False
    set_method(config, method)
    return config


NUM_ITERATIONS = 12
STUDY = f'''
from stare_jax.runs.study import Study

def get_study():
    return Study("{__file__}:{{method}}", methods=("ppo", "sta_ppo"), tasks=("PushCube-v1",), seeds=(0, 1))
'''


def main() -> None:
    import command  # noqa: F401, makes the library importable
    import pytest
    import toy_run

    with pytest.MonkeyPatch.context() as patch:
        toy_run.replace_simulator(patch)  # of a study, too, which makes sure that its configurations fit
        if sys.argv[1] == "study":
            import study

            study.TRAIN = Path(__file__)
            sys.exit(study.main(sys.argv[2:]))

        import train
        from absl import app

        app.run(train.main, flags_parser=train.parse_flags)


if __name__ == "__main__":
    main()
