"""Measures the PyTorch OpenVLA in a process of its own, which `openvla.py` starts: a line of JSON for every row.

python benchmarks/openvla_run_torch.py '{"size": "reduced", ...}'
"""

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from device import measure, measure_peak, reported
from openvla_cases import LORA, Inputs, Spec, make_block, make_config, make_inputs, weight_recipe
from openvla_torch import OpenVLA, build, generate, is_never_run, make_decoder
from openvla_torch_ppo import ValueHead, add_lora, checkpoint_layers, make_ppo_step

from stare_jax.models import OpenVLAConfig

LOSS = {"clip_eps": 0.2, "value_clip_eps": 0.2, "huber": 10.0}


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# ---- Weights and inputs ----------------------------------------------------------------------------------------------


@torch.no_grad()
def make_model(config: OpenVLAConfig, spec: Spec) -> OpenVLA:
    """Returns the model on the device, filled, with adapters that change nothing yet."""
    model = build(config, device=device(), dtype=getattr(torch, spec.dtype))
    block = torch.from_numpy(make_block(spec.seed)).to(device())
    for name, weight in model.named_parameters():
        if is_never_run(model, name):
            weight.zero_()
            continue
        offset, scale, shift = weight_recipe(name, tuple(weight.shape))
        values = torch.roll(block, -offset).repeat(-(-weight.numel() // block.numel()))[: weight.numel()]
        weight.copy_((scale * values + shift).view(weight.shape))
    torch.manual_seed(spec.seed)
    add_lora(model, rank=LORA.rank, alpha=LORA.alpha)
    return model


def as_tensors(inputs: Inputs, config: OpenVLAConfig) -> dict[str, torch.Tensor]:
    """Puts inputs onto the device, the images as bytes."""
    tensors = {name: torch.from_numpy(value).to(device()) for name, value in inputs._asdict().items()}
    tensors["ids"] = tensors["ids"].long()
    tensors["actions"] = config.action_vocab_end - 1 - tensors.pop("bins").long()
    tensors["mask"] = torch.ones_like(tensors["ids"], dtype=torch.bool)
    return tensors


def normalize(images: torch.Tensor, config: OpenVLAConfig, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalises bytes `[B, H, W, 3]` for each tower, `[B, 3, H, W]`."""
    pixels = images.permute(0, 3, 1, 2).float() / 255
    towers = ((config.dino.mean, config.dino.std), (config.siglip.mean, config.siglip.std))
    vectors = [[torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in pair] for pair in towers]
    return tuple(((pixels - mean) / std).to(dtype) for mean, std in vectors)


# ---- Measurements ----------------------------------------------------------------------------------------------------


def run_generate(spec: Spec, errors: list[str]) -> Iterator[dict[str, Any]]:
    config = make_config(spec)
    model = make_model(config, spec)
    vision = model.vision_backbone.forward
    for batch in spec.batches:
        for compiled in (False, True)[: 1 + spec.torch_compile]:
            with reported(errors, f"PyTorch{', compiled' if compiled else ''}, generate {batch}"):
                model.vision_backbone.forward = torch.compile(vision, dynamic=False) if compiled else vision
                yield from _generate(model, config, batch, spec, compiled)
            if compiled:
                torch.compiler.reset()  # Else the compiler gives up after a number of shapes.
            _release()


def _generate(model: OpenVLA, config: OpenVLAConfig, batch: int, spec: Spec, compiled: bool) -> list[dict[str, Any]]:
    inputs = make_inputs(config, batch, spec.seed)
    placed = as_tensors(inputs, config)
    length = (config.image_size // config.dino.patch_size) ** 2 + spec.prompt_length
    decoder, dtype = make_decoder(model, batch, length, compiled=compiled), getattr(torch, spec.dtype)

    def run(tensors=placed):
        pixels = normalize(tensors["images"], config, dtype)
        found = generate(model, pixels, tensors["ids"], tensors["mask"], padded=False, decoder=decoder)
        wait()
        return found

    start = time.perf_counter()
    found = run()
    compile_s = time.perf_counter() - start
    run(), run()  # CUDA graphs are recorded in the second run
    row = {"batch": batch, "compiled": compiled, "compile_s": compile_s}
    seconds = {
        "act": measure(lambda: run(as_tensors(inputs, config)).tokens.cpu().numpy(), spec.repeats),
        "generate": measure(run, spec.repeats),
    }
    index = (found.tokens - (config.action_vocab_end - 256))[..., None]
    logp = torch.log_softmax(found.logits, -1).gather(-1, index)[..., 0].sum(1)
    check = {"bins": (config.action_vocab_end - 1 - found.tokens).tolist(), "logp": logp.tolist()}
    rows = [{"case": case} | row | {"seconds": found} | _memory() for case, found in seconds.items()]
    return [rows[0], rows[1] | check]


def run_update(spec: Spec, errors: list[str]) -> Iterator[dict[str, Any]]:
    with reported(errors, f"PyTorch, update {spec.update_batch}"):
        yield _update(spec)


def _update(spec: Spec) -> dict[str, Any]:
    config, dtype = make_config(spec), getattr(torch, spec.dtype)
    model = make_model(config, spec)
    if spec.torch_remat:
        checkpoint_layers(model)
    head = ValueHead(config.llm.width, config.value_dims).to(device())
    step = make_ppo_step(model, head, microbatch=spec.microbatch, learning_rate=1e-4, value_learning_rate=3e-3, **LOSS)
    batch = as_tensors(make_inputs(config, spec.update_batch, spec.seed), config)
    batch["pixels"] = normalize(batch.pop("images"), config, dtype)
    with torch.no_grad():
        names, scores = ("ids", "mask", "actions"), []
        for i in range(0, spec.update_batch, spec.microbatch):
            part = slice(i, i + spec.microbatch)
            pixels = tuple(x[part] for x in batch["pixels"])
            scores.append(model.log_prob(pixels, *(batch[name][part] for name in names), padded=False)[0])
        batch["old_logp"] = torch.cat(scores)
    start = time.perf_counter()
    loss = float(step(batch))
    compile_s = time.perf_counter() - start

    def run():
        step(batch)
        wait()

    run()
    row = {"case": "update", "batch": spec.update_batch, "seconds": measure(run, spec.repeats), "compile_s": compile_s}
    return row | {"compiled": False, "loss": loss, "logp": batch["old_logp"].tolist()} | _memory()


def _memory() -> dict[str, float]:
    return {"peak_bytes": torch.cuda.max_memory_allocated()} if torch.cuda.is_available() else {}


def _release() -> None:
    """Gives back the memory that one batch size needed."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak(dtype: str) -> dict[str, float]:
    size, num_bytes = 1536, 2**28
    a, long = torch.ones(size, size, dtype=getattr(torch, dtype)), torch.ones(num_bytes // 4)
    out = torch.empty_like(long)
    return measure_peak(lambda: a @ a, size, lambda: torch.add(long, 1, out=out), num_bytes)


def main() -> None:
    with contextlib.redirect_stdout(sys.stderr):
        spec = Spec(**json.loads(sys.argv[1]))
        errors: list[str] = []
        runs = {"generate": run_generate, "update": run_update}
        for row in (row for case in spec.cases for row in runs[case](spec, errors)):
            print(json.dumps(row), file=sys.__stdout__, flush=True)
        name, versions = torch.cuda.get_device_name() if device() == "cuda" else "cpu", {"torch": torch.__version__}
        result = {"device": name, "versions": versions, "errors": errors}
        if device() == "cpu":
            result["peak"] = peak(spec.dtype)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
