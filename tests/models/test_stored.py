"""The model of a run and of the checkpoint that it starts from: every field that matters is compared."""

import dataclasses
import json

import pytest

from stare_jax.config import ConfigError, to_dict
from stare_jax.models import LoRAConfig, MLPConfig, openvla_7b, openvla_state, openvla_tiny, pi05_tiny
from stare_jax.models.nn.linear import Execution
from stare_jax.models.stored import check_same_model, model_from_dict, with_colours
from stare_jax.weights.openvla import OPENVLA

DESCRIPTION = {
    "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
    "image_sizes": [224, 224],
    "pad_to_multiple_of": 64,
    "text_config": {"vocab_size": 32064},
    "model_type": "openvla",
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(DESCRIPTION))
    return tmp_path


def test_the_published_model_is_the_preset(folder):
    check_same_model(OPENVLA.known(folder), openvla_7b())
    rounded = {
        "tvf_normalize_params": [
            {"mean": [0.484375, 0.455078125, 0.40625], "std": [0.228515625, 0.2236328125, 0.224609375]},
            {"mean": [0.5] * 3, "std": [0.5] * 3},
        ]
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(rounded))
    stored = OPENVLA.known(folder)
    check_same_model(stored, openvla_7b())
    # The run computes with the checkpoint's own numbers.
    model = with_colours(stored, openvla_7b())
    assert model.dino.mean == (0.484375, 0.455078125, 0.40625) and model.siglip.std == (0.5, 0.5, 0.5)
    assert dataclasses.replace(model, dino=openvla_7b().dino, siglip=openvla_7b().siglip) == openvla_7b()


def test_what_no_shape_tells_is_compared_and_all_of_it_named(folder):
    model = openvla_7b()
    model = dataclasses.replace(
        model,
        llm=dataclasses.replace(model.llm, norm_eps=1e-5),
        dino=dataclasses.replace(model.dino, mean=(0.5, 0.5, 0.5)),
    )
    with pytest.raises(ConfigError) as error:
        check_same_model(OPENVLA.known(folder), model, source=folder)
    message = str(error.value)
    assert message.splitlines() == [
        f"{folder} is of another model:",
        "  model.dino.mean: got [0.485, 0.456, 0.406], expected [0.5, 0.5, 0.5]",
        "  model.llm.norm_eps: got 1e-06, expected 1e-05",
    ]
    with pytest.raises(ConfigError, match="model.siglip: got .*, expected None"):
        check_same_model(OPENVLA.known(folder), openvla_state())
    with pytest.raises(ConfigError, match="got weights of OpenVLA, expected those of pi0.5"):
        check_same_model(to_dict(openvla_tiny()), pi05_tiny())


LORA = LoRAConfig(rank=2, alpha=4.0)


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        (
            openvla_tiny(lora=LORA),
            {
                "lora": LoRAConfig(rank=2, alpha=2.0),
                "prompt_template": "In: {instruction}",
                "tokenizer": "some/folder",
                "critic": "own",
                "label_width": 0.0,
                "restrict_logits": False,
                "center_crop": 0.9,
                "resize": "lanczos3",
                "camera": "hand_camera",
            },
        ),
        (
            pi05_tiny(),
            {
                "noise": "learned",
                "chunk": 2,
                "window": 4,
                "num_denoising_steps": 5,
                "prompt_template": "{instruction}\n",
                "critic": "detached",
                "noise_level": 0.25,
                "preference": "flow",
                "pad_actions": False,
            },
        ),
        (MLPConfig(), {"num_bins": 20, "label_width": 1.0}),
    ],
    ids=["openvla", "pi05", "mlp"],
)
def test_every_field_that_changes_what_is_computed_is_compared(model, changes):
    stored = json.loads(json.dumps(to_dict(model)))  # as metadata of a checkpoint come back
    check_same_model(stored, model)
    for name, value in changes.items():
        if value == getattr(model, name):
            continue
        with pytest.raises(ConfigError) as error:
            check_same_model(stored, dataclasses.replace(model, **{name: value}), source="runs/x/sft")
        first, line = str(error.value).splitlines()
        assert first == "runs/x/sft is of another model:" and line.startswith(f"  model.{name}"), name
    with pytest.raises(ConfigError) as error:
        check_same_model(stored, dataclasses.replace(model, **changes))
    assert len(str(error.value).splitlines()) == 1 + sum(value != getattr(model, n) for n, value in changes.items())


def test_how_it_is_computed_is_not_compared():
    model = openvla_tiny()
    fast = dataclasses.replace(
        model,
        execution=Execution(dtype="bfloat16", param_dtype="float32", remat="full"),
        frozen_patterns=("^dino/",),
        decode_unroll=2,
        unstack_layers=True,
        greedy="mean",
        prompt_length=200,
        lora=LORA,  # beside a model that has none, they are fresh
    )
    check_same_model(to_dict(model), fast)


def test_tokenizers_are_compared_by_their_files(tmp_path):
    for name, content in (("a", "x"), ("b", "x"), ("c", "y")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(content)
    a, b, c = (openvla_7b(tokenizer=str(tmp_path / name)) for name in "abc")
    check_same_model(to_dict(a), b)
    check_same_model(to_dict(a), openvla_7b())  # whose files are not at hand
    with pytest.raises(ConfigError, match="model.tokenizer: got .*/a', expected .*/c'"):
        check_same_model(to_dict(a), c)


def test_no_fields_are_no_model():
    with pytest.raises(ConfigError, match="^model: got no fields, expected a configuration"):
        model_from_dict({})
