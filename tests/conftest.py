"""One thread a process: the models are tiny, and several test processes share the cores."""

import gc
import logging
import os
from collections.abc import Iterator

import pytest

os.environ["OMP_NUM_THREADS"] = "1"

# Collections take a quarter of the time of importing everything, and find nothing.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


pytest_plugins = ["tests.helpers.sglang"]


@pytest.fixture(autouse=True)
def _own_log() -> Iterator[None]:
    """A test that sets up the package's log, as a rank does, sets it up for itself alone."""
    logger = logging.getLogger("megaopd")
    before = logger.level, logger.propagate, list(logger.handlers)
    yield
    level, logger.propagate, logger.handlers = before
    logger.setLevel(level)
    logging.disable(logging.NOTSET)
