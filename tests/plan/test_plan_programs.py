"""What a plan says of programs: products and exchanges by hand, memory as XLA's, and proposals that fit."""

import pytest
from on_eight_devices import run_on_eight_devices


@pytest.mark.slow
def test_the_plan_of_a_small_run_on_eight_devices(tmp_path):
    found = run_on_eight_devices("../plan/planned.py", str(tmp_path / "kept"), timeout=600)
    # Two of 16 rows on a device, five layers of 64 x 64; seven eighths of the weights come from elsewhere.
    loop = found["loop"]
    assert loop["flops"] == 5 * 2 * 2 * 64 * 64
    assert loop["gather"] == ["all-gather", 64 * 64 * 4, 64 * 64 * 4 * 7 / 8, 5, [5], 8]

    sampling = found["sampling"]
    assert sampling["num_rows"] == 8 and sampling["unknown"] == 0
    # Loops are counted: without, two of three layers and five of six tokens would be missing.
    assert sampling["counted"] == pytest.approx(1.05, abs=0.1)
    assert sampling["loops"] == ["layer", "token"] and sampling["bound"] in ("compute", "memory", "exchange")
    assert sampling["beside"] > 1000  # the optimiser's state

    # The weights that denoising steps read are whole on every device before the first of them.
    denoising = found["denoising"]
    assert denoising["of_steps"] == [] and denoising["num_of_prefix"] > 0
    assert denoising["made"] == denoising["expert"] > 0

    fitting = found["fitting"]
    assert fitting["peak"] == fitting["of_xla"]
    flags, peak, is_compiled = fitting["proposed"]
    assert flags == {"ppo.microbatch_size": 2048} and peak <= fitting["limit"] and is_compiled
    assert fitting["by_size"][0] == flags and fitting["by_size"][1] <= fitting["limit"] and not fitting["by_size"][2]
    flags, peak = fitting["best"]
    assert flags and peak <= fitting["limit"]
    assert fitting["none"] and fitting["is_kept"]
    assert fitting["line"].startswith("ppo does not fit: ")
    assert fitting["line"].endswith("(compiled) with --config.ppo.microbatch_size=2048")
