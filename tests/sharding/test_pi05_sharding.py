"""pi0.5 on many devices; a file of its own, so that it runs beside OpenVLA's and not behind it."""

import pytest
from on_eight_devices import check_full_size, check_models, run_on_eight_devices


@pytest.mark.slow
def test_pi05_on_eight_devices_is_that_on_one():
    check_models(run_on_eight_devices("sharded_models.py", "pi05", "few", timeout=600))


@pytest.mark.slow
def test_every_step_of_pi05_on_eight_devices_is_that_on_one():
    check_models(run_on_eight_devices("sharded_models.py", "pi05", timeout=3000))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["ppo 8 1 pi05", "sft 8 1 pi05 full", "sample 8 1 pi05"])
def test_pi05_gathers_one_layer_at_a_time(case):
    check_full_size(case, largest=2048 * 16384)
