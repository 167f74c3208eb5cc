import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--peer", action="append", default=[], help="as for python -m bench: heavyball=path/to/python")
