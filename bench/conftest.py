import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--save-results", action="store_true", help="write the tables to bench/results/*.csv")
    parser.addoption("--periods", type=int, default=8, help="refresh periods (of 10 steps) to measure (default: 8)")
