"""Benchmarks are run as scripts are."""

from tests.training.conftest import run_python  # noqa: F401  (a fixture)
