import pytest
from harness import operators


@pytest.fixture(scope="session")
def fibers():
    """torch.ops.soap_opt_fibers."""
    return operators()
