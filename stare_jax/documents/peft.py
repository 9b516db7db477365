"""adapter_config.json of PEFT: adapters of OpenVLA that add `alpha / r * B A` to kernels, and nothing else."""

from pathlib import Path
from typing import Literal, NamedTuple

from stare_jax.config import Positive
from stare_jax.documents.openvla import refuse_other_policies
from stare_jax.documents.reader import Size, check_record, raise_problems, read_json, show

_WITHOUT_EFFECT = {
    *("target_modules", "exclude_modules", "lora_dropout", "base_model_name_or_path", "revision", "auto_mapping"),
    *("inference_mode", "loftq_config", "megatron_core", "peft_version", "runtime_config", "qalora_group_size"),
    "ensure_weight_tying",
}
"""fields that do not change what adapters compute, besides those of `Adapter`; any other has to be empty"""

_EMPTY = (None, "", [], {})


class Adapter(NamedTuple):
    """The fields that are read."""

    peft_type: Literal["LORA"]
    r: Size
    lora_alpha: Positive
    bias: Literal["none"] = "none"
    init_lora_weights: Literal[True, False, "gaussian"] | None = None
    """an initialisation that changes the base weights is not undone here"""
    task_type: Literal["CAUSAL_LM", "FEATURE_EXTRACTION"] | None = None
    """for other tasks PEFT trains a layer besides the adapters"""


def read_adapter(file: Path) -> Adapter:
    """Reads the configuration of an adapter.

    OpenVLA-OFT keeps its adapter in a folder of its own, beside the other parts of the policy.

    Raises:
        DocumentError: a field is missing, damaged or of an adapter that computes something else; all are named.
    """
    for folder in (file.parent, file.parent.resolve().parent):
        refuse_other_policies(folder)
    fields = read_json(file)
    adapter, read = check_record(Adapter, fields, str(file)), {*Adapter._fields, *_WITHOUT_EFFECT}
    others = {name: x for name, x in sorted(fields.items()) if name not in read and x is not False and x not in _EMPTY}
    raise_problems(str(file), [f"{name}: got {show(x)}, expected nothing" for name, x in others.items()])
    return adapter
