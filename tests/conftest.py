"""Fixtures for all tests."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sdcore.backends import triton_interpreted


@pytest.fixture(autouse=True)
def uninitialized_memory_is_nan() -> Iterator[None]:
    """Fills ``torch.empty`` with NaN (integers with their maximum): an unwritten output shows."""
    before = torch.are_deterministic_algorithms_enabled()
    # The mode also complains of torch's own nondeterministic kernels on a GPU; that is not asked.
    torch.use_deterministic_algorithms(True, warn_only=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deterministic.*")
        yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer of small pipelines."""
    pytest.importorskip("diffusers")
    from tests import pipelines

    return pipelines.words(tmp_path_factory.mktemp("tokenizer"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    # Skipped from here, all of them make one line of the summary.
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    if item.get_closest_marker("interpreter") and not triton_interpreted():
        pytest.skip("runs in the process with TRITON_INTERPRET=1")
