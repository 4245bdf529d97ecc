"""What every test shares: fixed seeds and a strict Hypothesis profile."""

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("suite", deadline=None, max_examples=60, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("suite")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
