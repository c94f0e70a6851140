"""Benchmarks are run as scripts are."""

from tests.scripts.conftest import run_python  # noqa: F401  (a fixture)
