"""Where each parameter of the full-size models lies; `shardings/` has it as text, so that a change is seen.

python tests/configs/full_size_shardings.py        # writes the files anew
"""

from pathlib import Path

import jax
from jax.sharding import AbstractMesh

from configs.presets import make_model
from stare_jax.models import make_policy
from stare_jax.models.normalize import identity_stats
from stare_jax.sharding.mesh import make_abstract_mesh, path_name
from stare_jax.state.train_state import abstract_params

FOLDER = Path(__file__).parent / "shardings"
MODELS = {
    "openvla_7b_lora": (),
    "openvla_7b_full": ("full",),
    "pi05_expert": ("pi05",),
    "pi05_lora": ("pi05", "lora"),
    "pi05_full": ("pi05", "full"),
}
"""name of the file -> words of `configs.presets`; tasks and methods change nothing."""


def mesh() -> AbstractMesh:
    return make_abstract_mesh(data=1, fsdp=4, tensor=2)


def shardings_text(words: tuple[str, ...]) -> str:
    """Returns a line a parameter: path, shape, type, and the axes of the mesh that each of its axes is cut over."""
    config = make_model(words, camera="camera")
    policy = make_policy(config, identity_stats(config.action_dim, config.state_dim))
    lines = []
    for path, leaf in jax.tree.leaves_with_path(abstract_params(policy, mesh())):
        axes = ", ".join("x".join(axis) if isinstance(axis, tuple) else str(axis) for axis in leaf.sharding.spec)
        lines.append(f"{path_name(path)}  {leaf.dtype}{list(leaf.shape)}  ({axes})")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, words in MODELS.items():
        (FOLDER / f"{name}.txt").write_text(shardings_text(words), "utf-8")
