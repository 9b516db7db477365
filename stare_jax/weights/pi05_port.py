"""Tensors of openpi's PyTorch port and of lerobot: their names made the same, and a table from the leaves of pi0.5.

openpi's own tree is ours. lerobot's names are the port's with `model.` in front. The token embedding is tied to an
output layer, and has its name in the port's files. The expert has an output layer that is never run.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from stare_jax.models.pi05.network import Pi05Config
from stare_jax.weights.files import Tensors, WeightsError, is_same
from stare_jax.weights.tensor_table import CONV, HEADS_IN, LINEAR, NORM, SCALE, Entry, Rows, make_entries

LEROBOT_PREFIX = "model."
_PALIGEMMA, _EXPERT = "paligemma_with_expert.paligemma.", "paligemma_with_expert.gemma_expert."
EMBEDDINGS = (f"{_PALIGEMMA}lm_head.weight", f"{_PALIGEMMA}model.language_model.embed_tokens.weight")
"""names of the token embedding, tied: what PyTorch saves has the first alone"""
UNUSED = f"{_EXPERT}lm_head.weight"
"""an output layer of the expert, random and never run; the port's strict loading wants it nevertheless"""

_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module"}
"""parts of names that come of training in parallel and of compilation"""
_OURS = re.compile(r"^(paligemma_with_expert\.(paligemma|gemma_expert)\.|(action_in_proj|action_out_proj)\.)")
_EXPERT_NORM = r"gemma_expert\.model\.(layers\.\d+\.\w+_layernorm|norm)\."
_PI0 = re.compile(r"^(state_proj|action_time_mlp_in|action_time_mlp_out)\.")
_NEW_TOWER = re.compile(r"\.vision_tower\.(?!vision_model\.)")
"""the tower as newer versions of transformers name it"""
_LEFT = re.compile(r"^(state_proj|value_head|noise_head)\.")
"""parts that pi0.5 does not have: pi0's, and the heads of other reinforcement learning, which are other networks"""

_OUTER = {name: (name, LINEAR) for name in ("action_in_proj", "action_out_proj", "time_mlp_in", "time_mlp_out")}
_OUTER |= {
    "PaliGemma/llm/embedder/input_embedding": (EMBEDDINGS[0], "same"),
    "PaliGemma/img/head": (f"{_PALIGEMMA}model.multi_modal_projector.linear", LINEAR),
}
_BLOCK, _ATTENTION = "Transformer/encoderblock/", "Transformer/encoderblock/MultiHeadDotProductAttention_0/"
_TOWER = {
    "embedding": ("embeddings.patch_embedding", CONV),
    "pos_embedding": ("embeddings.position_embedding.weight", "leading"),
    "Transformer/encoder_norm": ("post_layernorm", NORM),
    f"{_ATTENTION}out": ("encoder.layers.{}.self_attn.out_proj", HEADS_IN),
}
_TOWER |= {
    f"{_ATTENTION}{x}": (f"encoder.layers.{{}}.self_attn.{x[0]}_proj", LINEAR) for x in ("query", "key", "value")
}
_TOWER |= {f"{_BLOCK}LayerNorm_{i}": (f"encoder.layers.{{}}.layer_norm{i + 1}", NORM) for i in (0, 1)}
_TOWER |= {f"{_BLOCK}MlpBlock_0/Dense_{i}": (f"encoder.layers.{{}}.mlp.fc{i + 1}", LINEAR) for i in (0, 1)}
_FLOW_NORM = {f"Dense_0/{leaf}": (f"dense.{name}", kind) for leaf, (name, kind) in LINEAR.items()}
"""leaves of a norm that follows from the flow time, as all of the second expert's do"""


def tensor_table(config: Pi05Config) -> dict[str, Entry]:
    """Returns the port's tensors for every leaf that openpi's tree has, adapters apart, by the leaf's path."""
    tower, depth = f"{_PALIGEMMA}model.vision_tower.vision_model.", config.paligemma.depth
    table = make_entries(_OUTER) | make_entries(_TOWER, config.siglip.depth, ours="PaliGemma/img/", theirs=tower)
    first, second = _expert_rows("", SCALE), _expert_rows("_1", _FLOW_NORM)
    table |= make_entries(first, depth, ours="PaliGemma/llm/", theirs=f"{_PALIGEMMA}model.language_model.")
    return table | make_entries(second, depth, ours="PaliGemma/llm/", theirs=f"{_EXPERT}model.")


def _expert_rows(number: str, norm: Mapping[str, tuple[str, str]]) -> Rows:
    """Returns the rows of one expert, given the number that is part of our names, and the leaves of its norms."""
    key, value, gate, up = (
        f"layers.{{}}.{name}_proj.weight" for name in ("self_attn.k", "self_attn.v", "mlp.gate", "mlp.up")
    )
    return {
        f"layers/attn/q_einsum{number}/w": ("layers.{}.self_attn.q_proj.weight", "per_head"),
        f"layers/attn/kv_einsum{number}/w": ((key, value), "per_head"),
        f"layers/attn/attn_vec_einsum{number}/w": ("layers.{}.self_attn.o_proj.weight", "heads"),
        f"layers/mlp{number}/gating_einsum": ((gate, up), "linear"),
        f"layers/mlp{number}/linear": ("layers.{}.mlp.down_proj.weight", "linear"),
        f"layers/pre_attention_norm{number}": ("layers.{}.input_layernorm", norm),
        f"layers/pre_ffw_norm{number}": ("layers.{}.post_attention_layernorm", norm),
        f"final_norm{number}": ("norm", norm),
    }


def find_prefix(tensors: Tensors) -> str | None:
    """Returns the beginning that a file's names have beside the port's: lerobot's, none, or None for another file."""
    if not any(_OURS.match(_clean_name(name)) for name in tensors):
        return None
    return LEROBOT_PREFIX if any(_unwrap(name).startswith(LEROBOT_PREFIX) for name in tensors) else ""


def _clean_name(name: str) -> str:
    """Returns a name without what lerobot and training in parallel add to it."""
    return re.sub(_NEW_TOWER, ".vision_tower.vision_model.", _unwrap(name).removeprefix(LEROBOT_PREFIX))


def _unwrap(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def clean_names(source: Path, tensors: Tensors) -> tuple[Tensors, Sequence[str]]:
    """Gives tensors the port's own names, the embedding that of the output layer that it is tied to.

    Raises:
        WeightsError: they are pi0's, two have the same name, or what should be tied is not the same.
    """
    names: dict[str, list[str]] = {}
    for name in tensors:
        names.setdefault(_clean_name(name), []).append(name)
    if twice := [", ".join(same) for same in names.values() if len(same) > 1]:
        raise WeightsError(f"{source}: got the same tensor under several names: {'; '.join(twice)}")
    clean = {name: tensors[original] for name, (original,) in names.items()}
    refuse_pi0(source, _list_pi0(clean))
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
        one, other = clean.get(first), clean.pop(second)
        if one is not None and not (one.spec == other.spec and is_same(one, other)):
            tied = f"those of {names[first][0]}, which it is tied to"
            raise WeightsError(f"{source}: {names[second][0]}: got other values, expected {tied}")
        clean.setdefault(first, other)
    kept = {name: stored for name, stored in clean.items() if name not in left}
    return kept, sorted(names[name][0] for name in left)


def _list_pi0(clean: Tensors) -> list[str]:
    """Returns the tensors that make a pi0: in a pi0.5 the expert's norms follow from the flow time."""
    plain = [name for name in clean if re.search(rf"{_EXPERT_NORM}weight$", name)]
    if not any(re.search(rf"{_EXPERT_NORM}dense\.", name) for name in clean):
        plain += [name for name in clean if _PI0.match(name)]
    return plain


def refuse_pi0(source: Path, names: Sequence[str]) -> None:
    """Raises WeightsError if there are names that only a pi0 has."""
    if names:
        raise WeightsError(f"{source}: got weights of pi0 ({', '.join(sorted(names)[:5])}), expected pi0.5's")
