"""What every test gets."""

import pytest
import torch


@pytest.fixture(autouse=True)
def same_random_numbers(request):
    """A test draws the same numbers whichever tests its worker ran before."""
    torch.manual_seed(0)
    generator = getattr(request.module, "GENERATOR", None)
    if generator is not None:
        generator.manual_seed(0)
