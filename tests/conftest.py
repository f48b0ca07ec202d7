"""Every test runs on one CPU thread (the suite's processes share two cores) and logs afresh."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With ``-m fast``, leave out files without that mark: importing them takes half the time."""
    if config.option.markexpr != "fast" or not collection_path.name.startswith("test_"):
        return None
    return "pytest.mark.fast" not in collection_path.read_text(encoding="utf-8") or None


@pytest.fixture(autouse=True)
def fresh_logger() -> Iterator[None]:
    """Undo what the command line does to the package's logger, also inside wider fixtures."""
    _reset_logger()
    yield
    _reset_logger()


def _reset_logger() -> None:
    logger = logging.getLogger("dat_ds")
    logger.setLevel(logging.NOTSET)
    logger.propagate = True
    logger.handlers.clear()
