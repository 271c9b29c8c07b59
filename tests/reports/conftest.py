import pytest

from tests.reports.models import trained


@pytest.fixture(scope="session", name="reports")
def _reports():
    """The report, the history and the multiply-adds of a trained network."""
    return trained()
