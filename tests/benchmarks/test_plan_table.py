"""The table of plans at full size: what is missing is compiled once, sizes decide where they can, cells by hand."""

import dataclasses
import json

import plan_table
import pytest

from configs.devices import FULL_GB
from stare_jax.plan.chips import CHIPS, parse_devices
from stare_jax.plan.page import document
from stare_jax.plan.programs import Exchange, Forecast

TIMES = {"cycles": 300_000_000, "compute_s": 0.1, "memory_s": 0.05, "products_s": 0.125, "exchange_s": 0.05}
FOUND = {"num_rows": 64, "fits": True, "is_compiled": True, "peak": 12e9, "least": 5e9, "needed": 9.85e12, **TIMES}
V5E, GPU = (next(row for row in plan_table.ROWS if row.devices == devices) for devices in ("v5e:2x4", "8xH100"))


def test_every_row_is_a_configuration_with_a_name_of_its_own():
    names = [row.name for row in plan_table.ROWS]
    assert len(set(names)) == len(names)
    for row in {(row.words, row.fields): row for row in plan_table.ROWS}.values():
        mesh = plan_table.config_of(row).mesh
        assert mesh.data * mesh.fsdp * mesh.tensor == row.number, row.name


def test_sizes_say_what_cannot_fit():
    row = next(row for row in plan_table.GPUS if row.words == "full" and row.devices == "1xH200")
    least = plan_table.least_bytes(row, "ppo")
    assert least == pytest.approx(FULL_GB["openvla full"] * 1e9, rel=0.02) and least > CHIPS["H200"].memory


def test_a_program_is_compiled_once_and_not_where_sizes_are_too_much(tmp_path, monkeypatch):
    compiled, out, table = [], tmp_path / "table.json", {}
    monkeypatch.setattr(plan_table, "least_bytes", lambda row, program: 5e9 if program == "sample" else 5e11)

    def compile_program(row, program, kept):
        compiled.append((row, program))
        return None if len(compiled) == 1 else dict(FOUND)

    monkeypatch.setattr(plan_table, "compile_program", compile_program)
    plan_table.fill(table, [V5E], out, tmp_path)  # the compilation fails, and is tried again
    plan_table.fill(table, [V5E], out, tmp_path)
    plan_table.fill(json.loads(out.read_text("utf-8")), [V5E], out, tmp_path)
    assert compiled == [(V5E, "sample")] * 2
    known = json.loads(out.read_text("utf-8"))[V5E.name]
    assert known["sample"] == FOUND and known["ppo"] == {"fits": False, "is_compiled": False, "least": 5e11}


def test_cells_are_rows_over_seconds_and_seconds():
    # 300 million cycles at 1.5 GHz are 0.2 s, and 0.05 s of exchanges follow; the roofline is that of products.
    table = {V5E.name: {"sample": FOUND, "ppo": FOUND | {"fits": False, "peak": 20e9}}}
    assert plan_table.row_cells(V5E, table)[3:] == ["12.0 of 17 GB", "512 / 256", "**no**: 20.0 of 17 GB", "—"]
    refused = {"fits": False, "is_compiled": False, "least": 90e9}
    table = {GPU.name: {"sample": refused, "ppo": FOUND | {"cycles": None}}}
    expected = ["**no**: 90.0 of 80 GB, by sizes", "—", "12.0 of 80 GB", "64: 0.125 s / —"]
    assert plan_table.row_cells(GPU, table)[3:] == expected
    assert plan_table.row_cells(GPU, {})[3:] == ["not compiled yet", "—", "not compiled yet", "—"]


def test_a_goal_is_a_share_of_the_peak():
    goal = plan_table.GOALS[2]
    # 9.85 TFLOP take a v5e 0.05 s, of 0.25 s.
    cells = plan_table.goal_cells(goal, {goal.row.name: {"ppo": FOUND}})
    assert cells[1:] == ["50 ms", "200 + 50 ms", "20 %", "45 % of the peak: **no**"]
    assert plan_table.goal_cells(goal, {})[2] == "not compiled yet"


def test_a_document_of_a_plan_has_every_field_but_single_exchanges():
    numbers = {"arguments": 3e6, "outputs": 2e5, "reused": 1e5, "intermediates": 8e7, "beside": 0, "flops": 1e9}
    exchanges = (Exchange("all-gather", ((4, "layer"),), 1e6, 7e6),)
    rest = {"num_rows": 64, "needed": None, "exchanges": exchanges, "compile_s": 1.0, "num_unknown_loops": 0}
    one = Forecast(program="ppo", **numbers, **rest, **TIMES)
    known, wider = (document([one], parse_devices(devices))["ppo"] for devices in ("1x0.08GB", "1x1GB"))
    assert known["peak"] == one.peak == 83.1e6 and not known["fits"] and wider["fits"]
    fields = {field.name for field in dataclasses.fields(Forecast)}
    assert fields - known.keys() == {"program", "exchanges"}
