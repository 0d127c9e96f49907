"""Fixtures of the cache's tests."""

from pathlib import Path

import pytest
from hypothesis import settings

from stillroom.cache.store import Cache
from tests.cache.fakes import make_identity

QUICK = settings(deadline=None, max_examples=25, derandomize=True, database=None)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """An empty cache."""
    return Cache.create(tmp_path / "root", make_identity())


@pytest.fixture
def root(cache: Cache) -> Path:
    """Its folder."""
    return Path(cache.storage.root)
