"""What schedules are tried with, and how they are compared."""

import torch
from hypothesis import strategies as st

SHIFTS = st.floats(0.01, 100) | st.sampled_from([0.01, 1, 100])
STEPS = st.integers(1, 200) | st.sampled_from([1, 2, 3, 200])


def close(ours: torch.Tensor, expected: object, atol: float = 1e-5) -> None:
    assert ours.dtype == torch.float32
    theirs = torch.as_tensor(expected, dtype=torch.float32)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)
