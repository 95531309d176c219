"""What tests of connectors share."""

import pytest

from tests.rest_case import Case


@pytest.fixture
def case(api, tmp_path):
    """An API on loopback, and how it is read."""
    return Case(api, tmp_path)
