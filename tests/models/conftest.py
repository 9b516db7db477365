import pytest
from nano_policy import INSTRUCTIONS, make_case, nano_config


@pytest.fixture(scope="session")
def nano():
    """The small policy and a batch of three observations with prompts of different lengths."""
    return make_case(nano_config(), INSTRUCTIONS)
