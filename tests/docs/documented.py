"""The command lines of the pages, found and parsed as the commands themselves parse them."""

import argparse
import importlib.util
import itertools
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
from absl import flags
from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))
OURS = re.compile(r"([A-Z_]+=\S+ )*(python |python3 |make |benchmarks/\w|launch/pod/\w)")
OTHERS = re.compile(
    r"(sudo|apt-get|gcloud|kubectl|srun|sbatch|scancel|docker|conda|uv|curl|wget|pip|git|source|nvidia-smi) "
)
MARK = re.compile(r"\*Needs [^*]+\*")
"""Mark of commands that need a device, a cluster or a network, `*Needs a TPU slice.*`, in the paragraph before their
block, or at the beginning of the first one below the page's title, for all of the page."""
HARMLESS = ("source .venv/bin/activate", "pip config ", "pip install ", "sudo apt-get install ")
PLACEHOLDERS = {"METHOD": "sta_ppo", "NAME": "franka_state", "$run": "runs/study", "RUN/": "runs/x/", "FILE": "FILE.py"}
PLACEHOLDERS |= {"--config=...": "--config=configs/quickstart.py", "--workdir=...": "--workdir=runs/quickstart"}
"""Words of the pages for what a reader puts there -> something that is."""


class Command(NamedTuple):
    page: str
    line: str
    is_marked: bool

    def __str__(self) -> str:
        return f"{self.page}: {self.line}"


class Parsed(Exception):
    """The arguments of a command have been parsed; nothing else is to happen."""


def commands_of(page: str, text: str) -> Iterator[Command]:
    """Yields the commands of a page, those within its sentences included."""
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    inline = [token for token in tokens if token.type == "inline"]
    of_page = bool(len(inline) > 1 and MARK.match(inline[1].content))
    before = ""
    for token in tokens:
        if token.type == "inline":
            before = token.content
            for child in token.children:
                if child.type == "code_inline" and OURS.match(child.content):
                    yield Command(page, child.content, of_page or bool(MARK.search(before)))
        elif token.type in ("fence", "code_block") and not token.info.startswith(("python", "{", "json", "yaml")):
            for line in logical_lines(token.content):
                if OURS.match(line) or OTHERS.match(line):
                    yield Command(page, line, of_page or bool(MARK.search(before)))


def logical_lines(block: str) -> list[str]:
    """Returns the lines of a block with continued ones joined, without prompts."""
    joined = re.sub(r"\\\n\s*", "", block)
    return [line.strip().removeprefix("$ ") for line in joined.splitlines()]


def words_of(line: str) -> list[str]:
    """Returns the words of a command line, with something in the place of what a reader has to put there."""
    line = re.sub(r"\$\([^)]*\)", "ppo", line.removesuffix("; do"))
    for name, value in PLACEHOLDERS.items():
        line = line.replace(name, value)
    words = shlex.split(line, comments=True)
    return words[: words.index(">")] if ">" in words else [word for word in words if word != "..."]


def parse(words: Sequence[str]) -> dict | None:
    """Parses the words of a command of ours as the command itself does; nothing is started.

    Returns:
        The values of the configuration that it names, if it does.

    Raises:
        SystemExit, UserError: the command refuses them.
        FileNotFoundError: there is no such script, or a file that it is given is not there.
    """
    variables = list(itertools.takewhile(lambda word: re.match(r"[A-Z_]+=", word), words))
    words = words[len(variables) :]
    if words[0] == "make":
        return parse_make(words[1:])
    if words[0].endswith("tpu.sh"):
        program = next((word.partition("=")[2] for word in variables if word.startswith("PROGRAM=")), "launch/train.py")
        return parse(["python", program, *words[3:]])
    script = words[1] if words[0].startswith("python") else words[0].replace(".sh", ".py")
    if not (ROOT / script).is_file():
        raise FileNotFoundError(f"{script}: there is no such script")
    for word in words:
        found = re.match(r"(?:--[\w.-]+=)?((?:configs|docs|tests)/[\w/.]+)", word)
        if found and not (ROOT / found[1]).exists() and not word.startswith("--out"):
            raise FileNotFoundError(f"{found[1]}: there is no such file")
    arguments = list(words[2:] if words[0].startswith("python") else words[1:])
    if "--help" in arguments or not arguments:
        return None
    return parse_train(arguments) if script == "launch/train.py" else parse_script(ROOT / script, arguments)


def parse_train(arguments: Sequence[str]) -> dict | None:
    """Parses the arguments of launch/train.py, and returns its configuration."""
    import train

    train._values.clear()
    try:
        train.parse_flags(["train.py", *arguments])
        return dict(train._values) | {"is_plan": flags.FLAGS.plan}
    finally:
        flags.FLAGS.unparse_flags()


def parse_make(words: Sequence[str]) -> dict | None:
    """Checks the targets of make, and the arguments that they hand on."""
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), flags=re.M)
    given = dict(word.split("=", 1) for word in words if "=" in word)
    named = [word for word in words if "=" not in word]
    if unknown := set(named) - set(targets):
        raise FileNotFoundError(f"make: there is no target {unknown}")
    if "quickstart" in named and "ARGS" in given:
        return parse_train(["--config=configs/quickstart.py", *shlex.split(given["ARGS"])])
    return None


def parse_script(path: Path, arguments: Sequence[str]) -> dict | None:
    """Parses the arguments of a script by its function that does so, else by running it up to where it has done so."""
    from configuration import load_configuration, split_fields

    module = load(path)
    if parser := getattr(module, "parse_arguments", None) or getattr(module, "parse", None):
        parser(list(arguments))
    else:
        run_to_arguments(module, [str(path), *arguments])
    fields, others = split_fields(arguments)
    chosen = [word.partition("=")[2] for word in others if word.startswith("--config=")]
    is_elsewhere = path.stem != "evaluate" or any(word.startswith("--policy=") for word in others)
    return load_configuration(chosen[0], fields) | {"is_plan": is_elsewhere} if chosen else None


def run_to_arguments(module: ModuleType, argv: Sequence[str]) -> None:
    """Runs the main function of a script, and ends it where its arguments have been parsed."""
    original, given = argparse.ArgumentParser.parse_args, sys.argv

    def parse_args(self, args=None, namespace=None):
        original(self, args, namespace)
        raise Parsed

    argparse.ArgumentParser.parse_args, sys.argv = parse_args, list(argv)
    try:
        with pytest.raises(Parsed):
            module.main()
    finally:
        argparse.ArgumentParser.parse_args, sys.argv = original, given


def load(path: Path) -> ModuleType:
    """Returns the module of a script."""
    if path.stem not in sys.modules or getattr(sys.modules[path.stem], "__file__", "") != str(path):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[path.stem])
    return sys.modules[path.stem]
