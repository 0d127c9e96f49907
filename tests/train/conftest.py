"""The brute-force twin, which is a module beside the tests and not an installed one."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def brute_force() -> ModuleType:
    """The NumPy twin of the objectives."""
    path = Path(__file__).with_name("brute_force.py")
    spec = importlib.util.spec_from_file_location("brute_force", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
