from __future__ import annotations

import pytest
import torch

from own_answers import Case, answer_itself


@pytest.fixture(scope="session")
def case32(make_tiny) -> Case:
    """float32, 6 samples, all answered right when untouched. Shared: leave the model as it is."""
    return answer_itself(make_tiny(), samples=6)


@pytest.fixture(scope="session")
def case64(make_tiny) -> Case:
    """The same in float64, where the order of summation shows below 1e-12 only."""
    return answer_itself(make_tiny(), samples=6, dtype=torch.float64)
