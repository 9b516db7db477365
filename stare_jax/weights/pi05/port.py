"""The names that pi0.5's tensors have in files of openpi's PyTorch port and of lerobot, made the same."""

import re
from pathlib import Path

import numpy as np

from stare_jax.weights.format import Clean
from stare_jax.weights.pi05.table import EMBEDDINGS, UNUSED
from stare_jax.weights.safetensors_folder import Stored, Tensors, WeightsError, read

LEROBOT_PREFIX = "model."
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module"}
"""parts of names that come of training in parallel and of compilation."""
_OURS = re.compile(r"^(paligemma_with_expert\.(paligemma|gemma_expert)\.|(action_in_proj|action_out_proj)\.)")
_ADAPTIVE = re.compile(r"gemma_expert\.model\.(layers\.\d+\.\w+_layernorm|norm)\.dense\.")
_PLAIN = re.compile(r"gemma_expert\.model\.(layers\.\d+\.\w+_layernorm|norm)\.weight$")
_PI0 = re.compile(r"^(state_proj|action_time_mlp_in|action_time_mlp_out)\.")
_TOWER = re.compile(r"\.vision_tower\.(?!vision_model\.)")
"""as newer versions of transformers name the tower."""
_LEFT = re.compile(r"^(state_proj|value_head|noise_head)\.")
"""parts that pi0.5 does not have: pi0's, and the heads of other reinforcement learning, which are other networks."""


def is_port(tensors: Tensors) -> bool:
    """Returns whether a file is the port's or lerobot's, by the names of its tensors."""
    return any(_OURS.match(clean_name(name)) for name in tensors)


def is_lerobot(tensors: Tensors) -> bool:
    """Returns whether the names of a file are lerobot's."""
    return any(_unwrap(name).startswith(LEROBOT_PREFIX) for name in tensors)


def clean_name(name: str) -> str:
    """Returns a name without what lerobot and training in parallel add to it."""
    return re.sub(_TOWER, ".vision_tower.vision_model.", _unwrap(name).removeprefix(LEROBOT_PREFIX))


def _unwrap(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def clean_names(source: Path, tensors: Tensors) -> Clean:
    """Gives tensors the port's own names, the embedding that of the output layer that it is tied to.

    Raises:
        WeightsError: they are pi0's, two have the same name, or what should be tied is not the same.
    """
    names: dict[str, list[str]] = {}
    for name in tensors:
        names.setdefault(clean_name(name), []).append(name)
    if twice := [", ".join(same) for same in names.values() if len(same) > 1]:
        raise WeightsError(f"{source}: got the same tensor under several names: {'; '.join(twice)}")
    clean = {name: tensors[original] for name, (original,) in names.items()}
    _refuse_pi0(source, clean)
    left = [name for name in clean if _LEFT.match(name) or name == UNUSED]
    for name in [name for name in clean if name.startswith("action_time_mlp_")]:
        # Some files call the flow time's layers as pi0 does; their shapes show whether they are pi0's.
        if (renamed := name.removeprefix("action_")) in clean:
            left.append(name)
        else:
            clean[renamed] = clean.pop(name)
            names[renamed] = names.pop(name)
    first, second = EMBEDDINGS
    if second in clean:
        if first in clean and not _is_same(clean[first], clean[second]):
            tied = f"those of {names[first][0]}, which it is tied to"
            raise WeightsError(f"{source}: {names[second][0]}: got other values, expected {tied}")
        clean.setdefault(first, clean.pop(second))
    kept = {name: stored for name, stored in clean.items() if name not in left}
    return Clean(kept, tuple(sorted(names[name][0] for name in left)))


def _refuse_pi0(source: Path, clean: Tensors) -> None:
    """Makes sure that the expert's norms follow from the flow time, which is what makes a pi0.5."""
    plain = [name for name in clean if _PLAIN.search(name)]
    if not any(_ADAPTIVE.search(name) for name in clean):
        plain += [name for name in clean if _PI0.match(name)]
    if plain:
        raise WeightsError(f"{source}: got weights of pi0 ({', '.join(sorted(plain)[:5])}), expected pi0.5's")


def _is_same(one: Stored, other: Stored, num_rows: int = 1024) -> bool:
    """Compares two tensors bit by bit, some rows at a time."""
    if one.spec != other.spec:
        return False
    first, second = read(one), read(other)
    rows = (slice(start, start + num_rows) for start in range(0, len(first), num_rows))
    return all(np.array_equal(first[part].view(np.uint8), second[part].view(np.uint8)) for part in rows)
