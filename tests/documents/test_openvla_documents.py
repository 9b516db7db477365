"""config.json of OpenVLA: fields whose other values compute other numbers are refused by name, damaged ones too."""

import json
import re

import pytest

from stare_jax.documents import DocumentError
from stare_jax.documents.openvla import read_description
from stare_jax.documents.peft import read_adapter

PUBLISHED = {
    "arch_specifier": "no-align+fused-gelu-mlp",
    "architectures": ["OpenVLAForActionPrediction"],
    "auto_map": {"AutoConfig": "configuration_prismatic.OpenVLAConfig"},
    "hf_llm_id": "meta-llama/Llama-2-7b-hf",
    "image_resize_strategy": "resize-naive",
    "image_sizes": [224, 224],
    "llm_backbone_id": "llama2-7b-pure",
    "llm_max_length": 2048,
    "model_type": "openvla",
    "n_action_bins": 256,
    "output_projector_states": False,
    "pad_to_multiple_of": 64,
    "pad_token_id": 32000,
    "text_config": {"model_type": "llama", "pad_token_id": 32000, "torch_dtype": "bfloat16", "vocab_size": 32064},
    "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
    "timm_override_act_layers": [None, None],
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_fused_vision_backbone": True,
    "vision_backbone_id": "dinosiglip-vit-so-224px",
}
WHOLE_TEXT = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "layer_types": ["full_attention"] * 32,
    "max_position_embeddings": 2048,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "pretraining_tp": 1,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "rope_scaling": None,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "top_k": 50,
}


def write(folder, **changes):
    (folder / "config.json").write_text(json.dumps(PUBLISHED | changes))
    return folder


def test_the_published_file_and_all_that_transformers_writes_of_a_llama_are_taken(tmp_path):
    description = read_description(write(tmp_path))
    assert (description.float_type, description.rope_theta, description.text_config.hidden_size) == (
        *("bfloat16", None),
        4096,
    )
    description = read_description(write(tmp_path, text_config=PUBLISHED["text_config"] | WHOLE_TEXT))
    assert description.rope_theta == 10_000


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("n_action_bins", 128, "got 128, expected 256"),
        ("arch_specifier", "no-align+gelu-mlp", "got 'no-align+gelu-mlp', expected"),
        ("llm_backbone_id", "vicuna-v15-7b", "got 'vicuna-v15-7b', expected 'llama2-7b-pure'"),
        ("use_fused_vision_backbone", False, "got False, expected True"),
        ("timm_override_act_layers[1]", [None, "quick_gelu"], "got 'quick_gelu', expected null"),
        ("quantization_config", {"load_in_4bit": True}, "got {'load_in_4bit': True}, expected null"),
        ("torch_dtype", "int8", "got 'int8', expected 'float32' or"),
        ("model_type", "prismatic", "got 'prismatic', expected 'openvla'"),
        ("image_sizes", [224, 384], "got 224 and 384, expected a square"),
        ("image_sizes", 224, "got 224, expected a list"),
        ("pad_to_multiple_of", -64, "got -64, expected greater than or equal to 0"),
        ("timm_model_ids[1]", PUBLISHED["timm_model_ids"][:1], "got ['vit_large_patch14_reg4_dinov2.lvd142m'], exp"),
        ("text_config", None, "got null, expected an object"),
        ("text_config.model_type", "mistral", "got 'mistral', expected 'llama'"),
        ("text_config.hidden_act", "gelu", "got 'gelu', expected 'silu'"),
        ("text_config.rope_scaling.type", {"type": "linear"}, "got 'linear', expected 'default'"),
        ("text_config.rope_scaling.rope_type", {"rope_type": "llama3"}, "got 'llama3', expected 'default'"),
        ("text_config.rope_scaling.factor", {"factor": 2.0}, "got 2.0, expected less than or equal to 1"),
        ("text_config.rope_parameters.full_attention", {"full_attention": {}}, "got {}, expected null"),
        ("text_config.rope_parameters.rope_type", {"rope_type": "yarn"}, "got 'yarn', expected 'default'"),
        ("text_config.rope_theta", float("inf"), "got inf, expected a finite number"),
        ("text_config.partial_rotary_factor", 0.5, r"got 0.5, expected greater than or equal to 1"),
        ("text_config.head_dim", 64, "got 64, expected 4096 / 32"),
        ("text_config.attention_bias", True, "got True, expected False"),
        ("text_config.mlp_bias", True, "got True, expected False"),
        ("text_config.tie_word_embeddings", True, "got True, expected False"),
        ("text_config.sliding_window", 4096, "got 4096, expected null"),
        ("text_config.layer_types[0]", ["sliding_attention"], "got 'sliding_attention', expected 'full_attention'"),
        ("text_config.quantization_config", {"bits": 4}, "got {'bits': 4}, expected null"),
        ("text_config.hidden_size", 10**9, "got 1000000000, expected less than or equal to 10000000"),
        ("text_config.num_hidden_layers", 10**6, "got 1000000, expected less than or equal to 1000"),
        ("text_config.vocab_size", "32064", "got '32064', expected a whole number"),
        ("text_config.rms_norm_eps", 0, "got 0, expected greater than 0"),
    ],
)
def test_what_would_compute_something_else_is_refused_by_name(tmp_path, field, value, message):
    section, _, name = field.rpartition("text_config.")
    changes = {re.split(r"[.\[]", name)[0]: value}
    folder = write(
        tmp_path, **({"text_config": PUBLISHED["text_config"] | changes} if section or name != field else changes)
    )
    with pytest.raises(DocumentError, match=re.escape(f"config.json: {field}: {message}")) as error:
        read_description(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "float16"}, "float16"),
        ({"torch_dtype": "bfloat16", "dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": None, "dtype": "bfloat16"}, "bfloat16"),
        ({}, None),
        (
            {"torch_dtype": "float32", "dtype": "bfloat16"},
            "got torch_dtype: 'float32', dtype: 'bfloat16', expected the",
        ),
    ],
)
def test_two_names_of_the_type_have_one_meaning(tmp_path, names, expected):
    fields = {name: value for name, value in PUBLISHED.items() if name != "torch_dtype"}
    (tmp_path / "config.json").write_text(json.dumps(fields | names))
    if len({value for value in names.values() if value}) < 2:
        assert read_description(tmp_path).float_type == expected
        return
    with pytest.raises(DocumentError, match=expected):
        read_description(tmp_path)


def test_two_names_of_the_rotary_base_have_one_meaning(tmp_path):
    for text, expected in (
        ({"rope_theta": 500.0}, 500),
        ({"rope_parameters": {"rope_theta": 500.0}}, 500),
        ({"rope_theta": 500.0, "rope_parameters": {"rope_theta": 500}}, 500),
        ({"rope_scaling": {"rope_type": "default", "rope_theta": 500.0}}, 500),
        ({}, None),
    ):
        assert read_description(write(tmp_path, text_config=text)).rope_theta == expected
    with pytest.raises(DocumentError, match="got text_config.rope_theta: 1.0, text_config.rope_parameters: 2.0"):
        read_description(write(tmp_path, text_config={"rope_theta": 1, "rope_parameters": {"rope_theta": 2}}))
    with pytest.raises(DocumentError, match="got text_config.rope_theta: 1.0, text_config.rope_scaling: 2.0"):
        read_description(write(tmp_path, text_config={"rope_theta": 1, "rope_scaling": {"rope_theta": 2}}))


def test_generation_that_changes_the_most_likely_token_is_refused(tmp_path):
    file = write(tmp_path) / "generation_config.json"
    file.write_text(
        json.dumps({"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 32000})
    )
    read_description(tmp_path)
    file.write_text(json.dumps({"repetition_penalty": 1.2, "num_beams": 4}))
    with pytest.raises(
        DocumentError, match=r"num_beams: got 4, expected 1(.|\n)*repetition_penalty: got 1.2, expected"
    ):
        read_description(tmp_path)


ADAPTER = {"peft_type": "LORA", "r": 32, "lora_alpha": 16, "task_type": None, "target_modules": "all-linear"}


@pytest.mark.parametrize(
    "name",
    [
        "action_head--150000_checkpoint.pt",
        "proprio_projector--latest_checkpoint.pt",
        "noisy_action_projector--1_checkpoint.pt",
        "vision_backbone--50000_checkpoint.pt",
        "pose_projector--10_checkpoint.pt",
        "action_head.pt",
    ],
)
def test_a_policy_with_parts_besides_openvla_is_refused_and_so_is_its_adapter(tmp_path, name):
    folder, adapter = write(tmp_path), tmp_path / "lora_adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps(ADAPTER))
    for harmless in ("training_args.bin", "optimizer.pt", "model.safetensors", "run--a.log"):
        (folder / harmless).touch()
    read_description(folder)
    assert read_adapter(adapter / "adapter_config.json").r == 32
    (folder / name).touch()
    message = f"{folder}: got {name}, parts of another policy such as OpenVLA-OFT, expected a plain OpenVLA"
    with pytest.raises(DocumentError, match=re.escape(message)):
        read_description(folder)
    with pytest.raises(DocumentError, match=re.escape(message)):
        read_adapter(adapter / "adapter_config.json")


def test_code_of_another_policy_beside_the_weights_is_refused(tmp_path):
    code = write(tmp_path) / "modeling_prismatic.py"
    code.write_text("class OpenVLAForActionPrediction: ...\n# num_attention_heads, action_header")
    read_description(tmp_path)
    code.write_text("from prismatic.vla.constants import ACTION_DIM, NUM_ACTIONS_CHUNK\n")
    with pytest.raises(
        DocumentError, match="modeling_prismatic.py: got NUM_ACTIONS_CHUNK, in the code of a policy such"
    ):
        read_description(tmp_path)
