"""What every test shares: fixed seeds, a strict Hypothesis profile, and one thread for each of several workers."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # before PyTorch reads it; the processes that tests start inherit it

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("suite", deadline=None, max_examples=60, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("suite")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
