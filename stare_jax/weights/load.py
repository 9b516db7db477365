"""Parameters that a phase starts from, once the model that they are of is known to be the run's."""

from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from stare_jax.logging import progress_bytes, say
from stare_jax.models import MLPConfig, ModelConfig, Policy
from stare_jax.models.nn.lora import add_adapters, drop_adapters, init_adapters, is_adapter, keep_adapters
from stare_jax.models.stored import check_same_model
from stare_jax.state.checkpoint import load_model, load_params, param_shapes
from stare_jax.state.storage import num_bytes
from stare_jax.state.train_state import CHECKPOINTS, abstract_params
from stare_jax.types import PyTree
from stare_jax.weights.formats import FORMATS, OPENVLA, find_format, is_ours, open_weights, read_params
from stare_jax.weights.side_files import CONFIG

UNTOLD = ("camera", "resize", "center_crop", "prompt_template", "label_width", "restrict_logits")
"""fields that no file of an OpenVLA checkpoint tells and no parameter depends on: a converted one has a preset's, and a
run that starts from it chooses its own"""


def initial_params(source: Path | None, policy: Policy, model: ModelConfig, mesh: Mesh, key: jax.Array) -> PyTree:
    """Returns parameters on the mesh, once the source's model is known to be the run's.

    Args:
        source: a phase of a run, a converted folder, or a checkpoint of others; None takes random weights.
        policy: the run's policy.
        model: configuration that the policy was made of; adapters that the source does not have are fresh.
        mesh: devices that the parameters are to be on.
        key: consumed.

    Raises:
        ConfigError: see `check_source`.
        CheckpointError, WeightsError: the source is damaged, or its parameters are not the model's.
    """
    like = abstract_params(policy, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
    if source is None:
        return jax.jit(policy.init, out_shardings=shardings)(key)
    check_source(source, model)
    adapters_key, key = jax.random.split(key)
    if is_ours(source):
        has_adapters = any(map(is_adapter, param_shapes(source / CHECKPOINTS)))
        loaded = load_params(source / CHECKPOINTS, like if has_adapters else drop_adapters(like), cast=True)
    else:
        opened = open_weights(source, config=model)
        has_adapters = any(map(is_adapter, opened.table))
        with progress_bytes(num_bytes(drop_adapters(like)), f"read {source.name}") as on_bytes:
            loaded = read_params(opened, key, like=like, on_bytes=on_bytes)
    if has_adapters or isinstance(model, MLPConfig) or model.lora is None:
        return loaded
    adapters = init_adapters(policy.init, adapters_key, out_shardings=keep_adapters(shardings))
    return add_adapters(loaded, adapters)


def check_source(source: Path, model: ModelConfig, *, name: str = "") -> None:
    """Makes sure that a model is that of a checkpoint of any kind, or says that the checkpoint does not tell.

    Raises:
        ConfigError: it computes something else; names all fields that differ, and the checkpoint, as `name` if given.
    """
    name = name or str(source)
    if stored := stored_model(source):
        untold = UNTOLD if is_ours(source) and (source / OPENVLA.kept).is_dir() else ()
        told = {field: value for field, value in stored.items() if field not in untold}
        check_same_model(told, model, source=name)
    else:
        say(f"{name}: its configuration is not in it, so that only names and shapes of its parameters are compared")


def is_converted(folder: Path) -> bool:
    """Returns whether a folder holds a converted checkpoint, and not a phase of a run."""
    return is_ours(folder) and any((folder / form.kept).is_dir() for form in FORMATS)


def stands_alone(folder: Path) -> bool:
    """Returns whether a folder holds a policy without a run: a converted checkpoint, or a policy that was exported."""
    return is_ours(folder) and ((folder / CONFIG).is_file() or is_converted(folder))


def stored_model(source: Path, *, step: int | None = None) -> dict[str, Any]:
    """Returns the fields of the model's configuration that a checkpoint of any kind tells, all, some or none.

    The step is a phase's; None takes the latest.
    """
    if not is_ours(source):
        form, _ = find_format(source)
        return form.known(source)
    fields = dict(load_model(source / CHECKPOINTS, step=step))
    if (tokenizer := fields.get("tokenizer")) and stands_alone(source) and (source / tokenizer).is_dir():
        fields["tokenizer"] = str(source / tokenizer)
    return fields
