import pytest
from torch import nn

from tests.helpers.diagnosis import Subject, subject_of


@pytest.fixture(scope="session")
def subject(network: nn.Module) -> Subject:
    """Every network family in turn. Shared by all tests, and every test leaves it as it was."""
    return subject_of(network)
