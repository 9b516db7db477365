"""Cuts the golden case of OpenVLA to the tokens that its inputs touch, so that it fits into the repository.

    python tests/golden/cut_openvla.py WHOLE tests/golden/openvla_tiny

Of the 32064 rows of the embedding and the output layer, those of the prompts' tokens, of the 256 action tokens and of
the 64 after them are kept, in this order, under new numbers. Only results of a softmax over the whole vocabulary are
computed again: log-probabilities and loss are those of the kept columns of the original's own logits.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

NUM_BINS, PADDING = 256, 64
VOCABULARY_LEAVES = ("lm_head.weight", "embed_tokens.weight", "lm_head.base_layer.weight", "lm_head.lora_B.weight")
ADAPTERS = ("lora_all_linear", "lora_attention")


def cut_tensors(tensors: dict[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
    """Returns tensors with the given rows of what has a row for every token."""
    return {
        name: np.ascontiguousarray(tensor[rows]) if name.endswith(VOCABULARY_LEAVES) else tensor
        for name, tensor in tensors.items()
    }


def score(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Returns log-probabilities float32 `[B, A]` of tokens, given logits `[B, A, V]`."""
    wide = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    logp = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    return np.take_along_axis(logp, tokens[..., None], -1)[..., 0].astype(np.float32)


def main(whole: Path, to: Path) -> None:
    with np.load(whole / "expected.npz") as arrays:
        expected = dict(arrays)
    old_end = expected["action_logits"].shape[-1] - PADDING
    words = np.unique(expected["input_ids"])
    rows = np.concatenate([words, np.arange(old_end - NUM_BINS, old_end + PADDING)])
    number = {old: new for new, old in enumerate(rows)}
    renumber = np.vectorize(number.get, otypes=[np.int64])
    for name in ("input_ids", "action_tokens", "greedy_tokens"):
        expected[name] = renumber(expected[name])
    for name in ("logits_last", "action_logits"):
        expected[name] = expected[name][..., rows]
    expected["action_logp"] = score(expected["action_logits"], expected["action_tokens"])
    expected["lm_loss"] = -expected["action_logp"].mean()
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir(parents=True)
    np.savez_compressed(to / "expected.npz", **expected)

    tensors: dict[str, np.ndarray] = {}
    for file in sorted(whole.glob("model-*.safetensors")):
        tensors |= load_file(file)
    save_file(cut_tensors(tensors, rows), to / "model.safetensors", metadata={"format": "pt"})
    description = json.loads((whole / "config.json").read_text())
    description["text_config"]["vocab_size"] = len(rows)
    (to / "config.json").write_text(json.dumps(description, indent=1) + "\n")
    for name in ADAPTERS:
        (to / name).mkdir()
        shutil.copyfile(whole / name / "adapter_config.json", to / name / "adapter_config.json")
        file = "adapter_model.safetensors"
        save_file(cut_tensors(load_file(whole / name / file), rows), to / name / file, metadata={"format": "pt"})
        with np.load(whole / name / "expected.npz") as arrays:
            logits = arrays["action_logits"][..., rows]
        logp = score(logits, expected["action_tokens"])
        np.savez_compressed(to / name / "expected.npz", action_logits=logits, action_logp=logp)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
