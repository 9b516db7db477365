import json

import pytest
import toy_run


@pytest.fixture
def on_toy():
    """Lets `run_ipi` find the toy where it looks for PushCube."""
    with pytest.MonkeyPatch.context() as patch:
        toy_run.replace_simulator(patch)
        yield


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """The directory of a run that has come to its end; not to be changed. Beside it are the lengths of its prompts."""
    from stare_jax.runs.ipi import run_ipi

    directory = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        toy_run.replace_simulator(patch)
        toy_run.prompt_lengths.clear()
        run_ipi(toy_run.make_config(), directory, profile=1)
    (directory.parent / "prompt_lengths").write_text(json.dumps(toy_run.prompt_lengths))
    return directory
