"""OpenVLA's checkpoints in Hugging Face's form: config.json, model*.safetensors, tokenizer, statistics."""

from pathlib import Path

from stare_jax.config import to_dict
from stare_jax.models.openvla.network import OpenVLAConfig
from stare_jax.weights.format import Clean, Format
from stare_jax.weights.openvla.config import CONFIG, add_statistics, find_statistics, read_config
from stare_jax.weights.openvla.table import tensor_table, unused_specs
from stare_jax.weights.safetensors_folder import Tensors, list_model, read_json
from stare_jax.weights.side_files import write_json


def describe(folder: Path) -> dict:
    """Returns the fields of a folder's config.json, none where there is no such object."""
    description = read_json(folder / CONFIG) if (folder / CONFIG).exists() else {}
    return description if isinstance(description, dict) else {}


def _find(source: Path) -> Tensors | None:
    description = describe(source)
    if description.get("model_type") == "openvla" or "timm_model_ids" in description:
        return list_model(source)
    return None


def _finish(folder: Path, config: OpenVLAConfig, dtype: str | None) -> None:
    del config
    if dtype is not None:
        write_json(folder / CONFIG, read_json(folder / CONFIG) | {"torch_dtype": dtype})


def _known(folder: Path) -> dict:
    fields = to_dict(read_config(folder))
    return {name: fields[name] for name in ("dino", "siglip", "projector_dim", "llm", "action_vocab_end", "image_size")}


OPENVLA = Format(
    name="openvla",
    model=OpenVLAConfig,
    kept="huggingface",
    find=_find,
    clean=lambda source, tensors: Clean(dict(tensors)),
    read_config=read_config,
    table=lambda config, names: tensor_table(config),
    statistics=find_statistics,
    add_statistics=add_statistics,
    unused=unused_specs,
    finish=_finish,
    max_bytes=5 * 10**9,
    keeps_unused=True,
    one_dtype=True,
    known=_known,
)
