"""What every test starts from: float64, one thread, a known seed."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def float64_and_seeded():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)
