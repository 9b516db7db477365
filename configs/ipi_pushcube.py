"""IPI on PushCube from images, with an hour for PPO: configs/study_pushcube_images.py with its preference phase.

    python launch/train.py --config=configs/ipi_pushcube.py              imitation, STA-TPO, STA-PPO
    python launch/train.py --config=configs/ipi_pushcube.py:ppo          PPO without shaping, as many steps

Expect 63 % after imitation; without the preference phase PPO ends at 91 to 94 % (docs/ppo.md), with it nobody has
measured. Imitation takes ten minutes on two CPU cores, preference a few, PPO 65 minutes on one.
"""

from configs import study_pushcube_images
from configs.presets import preference_on_cpu


def get_config(algorithm: str = "sta_ppo"):
    """Returns the configuration; `algorithm` is one of `presets.ALGORITHMS`."""
    config = study_pushcube_images.get_config(algorithm)
    config.name = f"ipi_pushcube_{algorithm}"
    config.phases = ("sft", "tpo", "ppo")
    preference_on_cpu(config)
    return config
