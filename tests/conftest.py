"""What every test shares: fixed seeds, a strict Hypothesis profile, and one thread for each of several workers."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # before PyTorch reads it; the processes that tests start inherit it

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("suite", deadline=None, max_examples=60, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("suite")


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    """Mark what runs for several hosts as independent of SpikingJelly's version where the host is snnTorch."""
    for item in items:
        if {"snntorch", "snntorch_neuron"} & set(item.name.partition("[")[2].rstrip("]").split("-")):
            item.add_marker(pytest.mark.host_independent)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
