"""Harnesses are run as scripts are."""

from tests.patches.conftest import patched, pristine  # noqa: F401
from tests.training.conftest import run_python, server  # noqa: F401
