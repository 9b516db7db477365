"""The table of tensors at full size against the published checkpoint's names, shapes and counts."""

import math
from dataclasses import replace

import openvla_files
import pytest
from openvla_files import export_specs

from stare_jax.models import LoRAConfig, openvla_7b
from stare_jax.models.blank import leaf_shapes
from stare_jax.weights.openvla import adapter_table, tensor_table, unused_specs
from stare_jax.weights.tensor_table import table_specs

NUM_PARAMS = 7_541_237_184


@pytest.fixture(scope="module")
def specs():
    return export_specs(openvla_7b(), "bfloat16")


def test_exported_tensors_are_the_public_ones(specs):
    assert {name: spec.shape for name, spec in specs.items()} == openvla_files.checkpoint_shapes(openvla_files.FULL)
    assert len(specs) == 982
    assert sum(math.prod(spec.shape) for spec in specs.values()) == NUM_PARAMS
    assert sum(spec.num_bytes for spec in specs.values()) == 2 * NUM_PARAMS


@pytest.mark.parametrize(
    ("prefix", "num_params", "num_tensors"),
    [
        ("vision_backbone.featurizer.", 303_230_976, 343),
        ("vision_backbone.fused_featurizer.", 427_680_704, 342),
        ("projector.", 71_385_600, 6),
        ("language_model.", 6_738_939_904, 291),
    ],
)
def test_parts_are_as_large_as_published(specs, prefix, num_params, num_tensors):
    shapes = [spec.shape for name, spec in specs.items() if name.startswith(prefix)]
    assert (sum(map(math.prod, shapes)), len(shapes)) == (num_params, num_tensors)


def test_our_parameters_and_what_is_kept_aside_are_all_of_it():
    ours = {path: leaf for path, leaf in leaf_shapes(openvla_7b()).items() if not path.startswith("value_head/")}
    assert set(ours) == set(tensor_table(openvla_7b()))
    unused = unused_specs(openvla_7b(), "bfloat16")
    # Last block of each tower (14 and 12 tensors), both final norms, the attention pool.
    assert len(unused) == 14 + 12 + 4 + 13
    assert sum(leaf.size for leaf in ours.values()) + sum(math.prod(s.shape) for s in unused.values()) == NUM_PARAMS


def test_adapters_are_those_of_all_linear():
    """Rank 32 on every product that is run, under PEFT's names."""
    config = replace(openvla_7b(), lora=LoRAConfig(rank=32))
    table = adapter_table(tensor_table(config))
    adapters = {path for path in leaf_shapes(config) if path.endswith(("/lora_a", "/lora_b"))}
    assert set(table) == adapters
    specs = table_specs(table, config, "float32")
    modules = {
        name.removesuffix(".weight"): shape
        for name, shape in openvla_files.checkpoint_shapes(openvla_files.FULL).items()
        if len(shape) in (2, 4) and name.endswith(".weight") and "embed_tokens" not in name
    }
    expected = {}
    for module, (outputs, *inputs) in modules.items():
        is_conv = len(inputs) > 1
        expected[f"{module}.lora_A.weight"] = (32, *inputs)
        expected[f"{module}.lora_B.weight"] = (outputs, 32, 1, 1) if is_conv else (outputs, 32)
    # What is never run has adapters in PEFT's files, not in our parameters.
    unused = (".featurizer.blocks.23.", "fused_featurizer.blocks.26.", "attn_pool.")
    for name in [name for name in expected if any(part in name for part in unused)]:
        del expected[name]
    assert {name: spec.shape for name, spec in specs.items()} == expected
    assert {spec.dtype for spec in specs.values()} == {"float32"}
