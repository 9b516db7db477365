"""Prompts: layout, templates, the built-in vocabulary, and tokenizers in Hugging Face's format built on the spot."""

import dataclasses
import hashlib
import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from llama_tokenizer import NEWLINE_ID, PAD_ID, SPACE_ID, write_llama_tokenizer

from stare_jax import stages
from stare_jax.config import ConfigError
from stare_jax.models import make_policy, openvla_7b
from stare_jax.models.bins import bin_state
from stare_jax.models.normalize import identity_stats
from stare_jax.models.openvla.prompt import OPENVLA_STATE_TEMPLATE, OPENVLA_TEMPLATE, encode_prompt, format_prompt
from stare_jax.models.tokenizer import NETWORK_TIMEOUT_S, make_tokenizer, word_tokenizer


def test_prompt_is_openvlas():
    prompt = format_prompt(OPENVLA_TEMPLATE, "Put Carrot on Plate ", ())
    assert prompt == "In: What action should the robot take to put carrot on plate?\nOut:"
    assert "State: 3 255;" in format_prompt(OPENVLA_STATE_TEMPLATE, "go", np.array([3, 255]))


def test_layout_is_bos_padding_text_answer():
    words = word_tokenizer()
    text = words.encode("push the cube")
    tokens, mask = encode_prompt(words, "push the cube", length=7)
    np.testing.assert_array_equal(tokens, [words.bos_id, words.pad_id, words.pad_id, *text, words.answer_id])
    np.testing.assert_array_equal(mask, [True, False, False, True, True, True, True])
    with pytest.raises(ValueError, match="prompt_length: got 4, expected at least 5 for 'push the cube'"):
        encode_prompt(words, "push the cube", length=4)


@pytest.mark.parametrize("env_id", stages.TASKS)
def test_every_task_is_told_in_whole_words_that_fit_the_tiny_preset(env_id):
    instruction = stages.get_task(env_id).instruction
    ids = word_tokenizer().encode(instruction)
    assert len(ids) == len(instruction.split())
    assert len(ids) + 2 <= 12


def test_word_tokenizer_keeps_different_texts_apart():
    words = word_tokenizer()
    texts = ["push", "pull", "0", "255", "256", "ab cd", "abcd", "zzz", "über", "?", "12 3", "1 23", "a_b"]
    assert len({tuple(words.encode(text)) for text in texts}) == len(texts)
    assert words.encode("PUSH  the\ncube") == words.encode("push the cube")
    assert max(max(words.encode(text)) for text in texts) < words.vocab_size
    assert len(words.encode("255")) == 1 and len(words.encode("256")) == 4  # a space and three bytes


def test_state_bins_are_256_equal_ones():
    state = np.float32([-1.0, -0.999, -1 + 2 / 256, 0.0, 0.999, 1.0])
    np.testing.assert_array_equal(bin_state(state), [0, 0, 1, 128, 255, 255])


@pytest.fixture(scope="module")
def checkpoint_folder(tmp_path_factory):
    """A word-level tokenizer saved in Hugging Face's format, with or without the token that OpenVLA needs."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")

    def make(*extra):
        words = ["<unk>", "<s>", "</s>", "push", "cube", *extra]
        vocabulary = {word: i for i, word in enumerate(words)}
        model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
        model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        folder = tmp_path_factory.mktemp("tokenizer")
        special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
        transformers.PreTrainedTokenizerFast(tokenizer_object=model, **special).save_pretrained(folder)
        return str(folder)

    return make


def test_hugging_face_tokenizer(checkpoint_folder):
    tokenizer = make_tokenizer(checkpoint_folder("▁"))
    tokens, mask = encode_prompt(tokenizer, "push cube", length=6)
    np.testing.assert_array_equal(tokens, [1, 1, 1, 3, 4, 5])
    np.testing.assert_array_equal(mask, [True, False, False, True, True, True])
    # A prompt that already ends in the lone space gets no second one.
    np.testing.assert_array_equal(encode_prompt(tokenizer, "push ▁", length=3)[0], [1, 3, 5])


def test_hugging_face_tokenizer_without_the_lone_space_is_refused(checkpoint_folder):
    with pytest.raises(ValueError, match="got no token '▁', expected a SentencePiece vocabulary"):
        make_tokenizer(checkpoint_folder())


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="tokenizer: got '.*' without a tokenizer.json, expected"):
        make_tokenizer(str(tmp_path))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder with Llama's tokenizer, as it comes with OpenVLA's checkpoints, and its pieces' ids."""
    folder = tmp_path_factory.mktemp("llama")
    return str(folder), write_llama_tokenizer(folder)


def test_openvlas_prompt_piece_by_piece(llama):
    """Lower case, BOS, padding that is masked, text, one lone space: ids are those of the files."""
    folder, ids = llama
    policy = make_policy(openvla_7b(tokenizer=folder), identity_stats(7, 0))
    tokens, mask = policy.tokenize(["Put CARROT on plate ", "put carrot"], np.zeros((2, 0)))
    question = ["▁In", ":", "▁What", "▁action", "▁should", "▁the", "▁robot", "▁take", "▁to"]
    answer = [ids["?"], NEWLINE_ID, ids["Out"], ids[":"], SPACE_ID]
    for row, kept, words in zip(tokens, mask, ("▁put ▁carrot ▁on ▁plate", "▁put ▁carrot"), strict=True):
        text = [ids[piece] for piece in (*question, *words.split())] + answer
        assert (row.dtype, row.shape) == (np.int32, (40,))
        np.testing.assert_array_equal(row, [1, *[PAD_ID] * (39 - len(text)), *text])
        np.testing.assert_array_equal(kept, [True, *[False] * (39 - len(text)), *[True] * len(text)])


def test_the_lone_space_is_there_once(llama):
    tokenizer = make_tokenizer(llama[0])
    assert tokenizer[1:] == (1, PAD_ID, SPACE_ID, PAD_ID + 1)
    prompt = format_prompt(OPENVLA_TEMPLATE, "put carrot", ())
    assert tokenizer.encode(prompt)[-1] != SPACE_ID and tokenizer.encode(prompt + " ")[-1] == SPACE_ID
    once, with_space = (encode_prompt(tokenizer, text, length=40) for text in (prompt, prompt + " "))
    np.testing.assert_array_equal(once, with_space)
    assert once[0][-2:].tolist() == [llama[1][":"], SPACE_ID]


@pytest.mark.parametrize("word", ["</s>", "<s>", "<unk>"])
def test_a_special_token_in_an_instruction_is_refused(llama, word):
    """Encoded, it would end the prompt or mask a part of it."""
    policy = make_policy(openvla_7b(tokenizer=llama[0]), identity_stats(7, 0))
    with pytest.raises(ValueError, match=f"prompt: got '{word}' in .*, expected a text without the tokenizer's own"):
        policy.tokenize([f"put {word} carrot"], np.zeros((1, 0)))


def test_settings_of_others_in_a_tokenizers_files_do_not_reach_a_prompt(llama, tmp_path):
    """Sides and lengths of padding, lengths at which to cut, tokens to add: prompts are laid out here."""
    folder = Path(shutil.copytree(llama[0], tmp_path / "copy"))
    fields = json.loads((folder / "tokenizer.json").read_text())
    fields["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 30}, "direction": "Left", "pad_to_multiple_of": None}
    fields["padding"] = padding | {"pad_id": PAD_ID, "pad_type_id": 0, "pad_token": "<PAD>"}
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"padding_side": "left", "add_eos_token": True, "model_max_length": 4}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    text = "What action to put carrot on plate?"
    theirs, ours = (make_tokenizer(place).encode(text) for place in (str(folder), llama[0]))
    assert theirs == ours and len(ours) > 4


@pytest.mark.parametrize(("name", "message"), [("tokenizer.json", "pointer of Git LFS"), ("merges.txt", "links")])
def test_files_of_a_tokenizer_that_were_not_fetched_are_named(llama, tmp_path, name, message):
    folder = Path(shutil.copytree(llama[0], tmp_path / "copy"))
    if name == "tokenizer.json":
        (folder / name).write_text("version https://git-lfs.github.com/spec/v1\n")
    else:
        (folder / name).symlink_to(tmp_path / "blobs" / "4d7a")
    with pytest.raises(ConfigError, match=message):
        make_tokenizer(str(folder))


def test_more_ids_than_the_model_has_are_refused(llama):
    small = openvla_7b(tokenizer=llama[0])
    small = dataclasses.replace(small, llm=dataclasses.replace(small.llm, vocab_size=32000))
    policy = make_policy(small, identity_stats(7, 0))
    with pytest.raises(ValueError, match="tokenizer '.*': got 32001 ids, expected at most vocab_size 32000"):
        policy.tokenize(["put carrot"], np.zeros((1, 0)))


class Hub(http.server.BaseHTTPRequestHandler):
    """A server of one repository's files, as huggingface.co serves them; 404 for all else."""

    folder, name = "", "some/llama"

    def do_HEAD(self):
        prefix = f"/{self.name}/resolve/main/"
        file = Path(self.folder) / self.path.removeprefix(prefix)
        content = file.read_bytes() if self.path.startswith(prefix) and file.is_file() else None
        self.send_response(404 if content is None else 200)
        if content is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        else:
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        return content

    def do_GET(self):
        self.wfile.write(self.do_HEAD() or b"")

    def log_message(self, *arguments):
        pass


def load_from(endpoint, cache, *names):
    """Loads tokenizers by their names in a process of its own; returns (a line for each, seconds)."""
    code = "import sys\nfrom stare_jax.config import UserError\nfrom stare_jax.models.tokenizer import make_tokenizer\n"
    code += "for name in sys.argv[1:]:\n    try:\n        print(make_tokenizer(name).encode('put carrot'))\n"
    code += "    except UserError as error:\n        print(error)\n"
    paths = os.pathsep.join([str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "PYTHONPATH": paths}
    environment = {key: value for key, value in environment.items() if not key.lower().endswith("_proxy")}
    start = time.monotonic()
    argv = [sys.executable, "-c", code, *names]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), time.monotonic() - start


@pytest.mark.parametrize("is_silent", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["refuses", "is silent"])
def test_a_tokenizer_that_cannot_be_downloaded_is_one_line_and_soon(tmp_path, is_silent):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if is_silent:  # takes connections and never answers
            server.listen()
        (said,), seconds = load_from(f"http://127.0.0.1:{server.getsockname()[1]}", tmp_path, "some/llama")
    assert said.startswith(
        "model.tokenizer: got 'some/llama', which is no folder here, and its tokenizer.json cannot be "
    )
    assert said.endswith("a checkpoint that has one: --config.model.tokenizer=FOLDER")
    assert seconds < NETWORK_TIMEOUT_S + 40  # the rest is what imports take


def test_a_tokenizer_is_downloaded_once(llama, tmp_path):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("OfLlama", (Hub,), {"folder": llama[0]})) as server:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            (first, missing), _ = load_from(endpoint, tmp_path, "some/llama", "some/other")
        finally:
            server.shutdown()
            thread.join()
    assert first == f"{[llama[1]['▁put'], llama[1]['▁carrot']]}"
    assert missing.startswith("model.tokenizer: got 'some/other', which is no folder here")
    assert load_from(endpoint, tmp_path, "some/llama")[0] == [first]  # without the server
