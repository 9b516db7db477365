"""Every command of the README and of the pages is one that its own parser takes, or is marked with what it needs.

Commands of ours are parsed by the command itself: its flags, the configuration that it names, and every field that it
sets. `test_commands_run.py` runs those that are not marked, one after another; it is slow.
"""

import pytest
from documented import HARMLESS, OURS, PAGES, ROOT, Command, commands_of, parse, words_of

from stare_jax.config import UserError, from_dict
from stare_jax.models import MLPConfig, OpenVLAConfig, Pi05Config
from stare_jax.runs.config import RunConfig

COMMANDS = {page: list(commands_of(page, (ROOT / page).read_text("utf-8"))) for page in PAGES}
"""Page -> its commands."""


def problem_of(command: Command) -> str | None:
    """Returns what is wrong with a command of a page, None if nothing is."""
    if not OURS.match(command.line) or " -m " in command.line:
        is_fine = command.is_marked or command.line.startswith(HARMLESS)
        return None if is_fine else "it is not ours, and not marked with what it needs"
    try:
        values = parse(words_of(command.line))
        if values is None:
            return None
        is_plan = values.pop("is_plan")
        values.pop("name")
        config = from_dict(RunConfig, values)
    except SystemExit as stopped:
        return f"it is refused, with exit code {stopped.code}"
    except (UserError, FileNotFoundError) as error:
        return str(error)
    if needs := device_of(config, is_plan):
        return None if command.is_marked else f"it needs {needs}, and is not marked with it"
    return None


def device_of(config: RunConfig, is_plan: bool) -> str:
    """Returns what a run needs beside a processor, empty if nothing."""
    if is_plan:
        return ""
    if config.env.backend == "cuda":
        return "a GPU that simulates"
    return "an accelerator" if is_of_full_size(config.model) else ""


def is_of_full_size(model: OpenVLAConfig | Pi05Config | MLPConfig) -> bool:
    """True for a network that no processor trains."""
    width = {OpenVLAConfig: lambda: model.llm.width, Pi05Config: lambda: model.paligemma.width}
    return width.get(type(model), lambda: 0)() >= 2048


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page(page, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    problems = {command.line: problem for command in COMMANDS[page] if (problem := problem_of(command))}
    assert not problems, f"{problems}\n{capfd.readouterr().err}"


def test_there_are_commands_of_all_kinds():
    found = {words_of(command.line)[1] for commands in COMMANDS.values() for command in commands if " " in command.line}
    ours = {
        f"launch/{name}.py" for name in ("train", "plan", "collect", "convert", "import_rlds", "evaluate", "compare")
    }
    assert found >= ours | {"launch/study.py", "launch/show_stages.py", "launch/serve.py", "quickstart", "test"}


ON_A_GPU = "--config.env.backend=cuda --config.env.num_workers=1"
WRONG = [
    ("python launch/train.py --config=configs/quickstart.py --config.ppo.gama=0.9", "exit code 2"),
    ("python launch/train.py --config=configs/nothing.py", "configs/nothing.py: there is no such file"),
    ("python launch/train.py --config=configs/quickstart.py --config.ppo.gamma=2", "gamma: got 2.0, expected"),
    ("python launch/train.py --config=configs/ipi_widowx.py", "it needs an accelerator"),
    (f"python launch/train.py --config=configs/quickstart.py {ON_A_GPU}", "it needs a GPU that simulates"),
    ("python launch/evaluate.py --run=runs/x --phase=ppo --perturbation=all", "exit code 2"),
    ("python launch/plan.py --config=configs/quickstart.py:tpc --devices=1xH100", "got 'tpc'"),
    ("python launch/trian.py --config=configs/quickstart.py", "there is no such script"),
    ("python benchmarks/serve.py --clients=3 --jsn=FILE", "exit code 2"),
    ("make quikstart", "there is no target"),
    ("gcloud compute tpus tpu-vm list", "not marked with what it needs"),
]


@pytest.mark.parametrize(("line", "message"), WRONG)
def test_what_does_not_fit_is_found(line, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    (command,) = commands_of("page.md", f"# A page\n\nText.\n\n    {line}\n")
    assert message in (problem_of(command) or "")


def test_a_mark_is_that_of_the_paragraph_before_or_of_the_page():
    page = "# A page\n\n{}\n\n    gcloud a\n\nText.\n\n```\n$ gcloud b \\\n    --c\n```\n"
    for text, marks in (("Text.", [False, False]), ("*Needs a slice.* Text.", [True, True])):
        assert [command.is_marked for command in commands_of("page.md", page.format(text))] == marks
    (_, second) = commands_of("page.md", page.format("Text."))
    assert second.line == "gcloud b --c"
    later = "# A page\n\nText.\n\n*Needs a slice:*\n\n    gcloud a\n\nText.\n\n    gcloud b\n"
    assert [command.is_marked for command in commands_of("page.md", later)] == [True, False]
