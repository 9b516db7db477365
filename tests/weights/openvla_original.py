"""Tokens and actions of the published OpenVLA class for folders of weights, in an environment of its own.

    python openvla_original.py CODE REQUEST.npz REPLY.json NAME=FOLDER[+ADAPTER] ...

CODE holds modeling_prismatic.py and configuration_prismatic.py as they are published, REQUEST.npz `input_ids [N, L]`,
`pixel_values [N, 6, H, W]` and `unnorm_key`. Nothing of stare_jax is imported.
"""

import importlib
import json
import sys
import types
from pathlib import Path

import numpy as np
import torch


def import_timm():
    """Imports timm, and with it torchvision.

    PyTorch's torchvision for CUDA beside a build of torch for CPUs cannot be imported without the signatures of two
    operators, which nothing here calls; a torchvision that fits its torch makes them itself, and ends the process where
    they are there.
    """
    try:
        return importlib.import_module("timm")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for operator in ("nms", "qnms"):
        _SIGNATURES.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    for name in [name for name in sys.modules if name.partition(".")[0] in ("timm", "torchvision")]:
        del sys.modules[name]  # what was imported until then
    return importlib.import_module("timm")


_SIGNATURES = torch.library.Library("torchvision", "FRAGMENT")
timm = import_timm()


def load_class(code):
    """Returns the published class; its two files are a package, because one imports the other as its sibling."""
    package = types.ModuleType("published")
    package.__path__ = [str(code)]
    sys.modules["published"] = package
    return importlib.import_module("published.modeling_prismatic").OpenVLAForActionPrediction


def load_model(cls, folder, adapter):
    """Loads weights, and an adapter by PEFT; towers have the sizes of config.json, where timm's ids say larger ones."""
    overrides = json.loads((folder / "config.json").read_text()).get("tiny_timm_overrides", {})
    create = timm.create_model
    timm.create_model = lambda name, **options: create(name, **options, **overrides.get(name, {}))
    try:
        model, info = cls.from_pretrained(folder, torch_dtype=torch.float32, output_loading_info=True)
    finally:
        timm.create_model = create
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    if adapter is not None:
        from peft import PeftModel

        wrapped = PeftModel.from_pretrained(model, adapter)
        moved = [weight.abs().max() > 0 for name, weight in wrapped.named_parameters() if "lora_B" in name]
        assert moved and all(moved), "adapters that PEFT made are zero until it has loaded the file's"
        model = wrapped.base_model.model
        model.norm_stats = json.loads(
            (Path(adapter) / "dataset_statistics.json").read_text()
        )  # as OpenVLA's scripts do
    return model.eval()


@torch.inference_mode()
def play(model, request):
    """Returns the seven tokens that `generate` adds, and the action of `predict_action`, of every row."""
    unnorm_key = str(request["unnorm_key"])
    rows = {"tokens": [], "actions": []}
    for ids, pixels in zip(request["input_ids"], request["pixel_values"], strict=True):
        ids, pixels = torch.from_numpy(ids)[None].long(), torch.from_numpy(pixels)[None]
        options = {"pixel_values": pixels, "attention_mask": torch.ones_like(ids), "do_sample": False}
        dim = model.get_action_dim(unnorm_key)
        rows["tokens"].append(model.generate(ids, max_new_tokens=dim, **options)[0, -dim:].tolist())
        rows["actions"].append(np.asarray(model.predict_action(ids, unnorm_key=unnorm_key, **options)).tolist())
    return rows


def main(code, request, reply, *models):
    cls, request = load_class(Path(code)), np.load(request)
    replies = {}
    for name, _, folders in (model.partition("=") for model in models):
        folder, _, adapter = folders.partition("+")
        replies[name] = play(load_model(cls, Path(folder), adapter or None), request)
    Path(reply).write_text(json.dumps(replies))


if __name__ == "__main__":
    torch.set_num_threads(2)
    main(*sys.argv[1:])
