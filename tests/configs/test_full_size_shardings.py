"""Parameters of the full-size models lie where they did; what moves is to be seen in the difference of a file."""

import math

import pytest
from full_size_shardings import FOLDER, MODELS, mesh, shardings_text

LARGE = 3_000_000
"""numbers of a parameter that is cut over the mesh"""


@pytest.mark.parametrize("name", MODELS)
def test_parameters_lie_where_the_file_says(name):
    expected = (FOLDER / f"{name}.txt").read_text("utf-8")
    assert shardings_text(MODELS[name]) == expected, "python tests/configs/full_size_shardings.py writes it anew"


def test_every_file_is_of_a_model_and_large_parameters_are_cut():
    assert {path.stem for path in FOLDER.iterdir()} == set(MODELS)
    for name in MODELS:
        for line in (FOLDER / f"{name}.txt").read_text("utf-8").splitlines():
            _, kind, axes = line.split("  ")
            num_elements = math.prod(int(size) for size in kind.partition("[")[2].rstrip("]").split(","))
            assert num_elements < LARGE or any(axis in axes for axis in mesh().axis_names), line
