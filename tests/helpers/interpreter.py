"""Whether Triton's interpreter works here."""

import torch
import triton
import triton.language as tl


@triton.jit
def _loop(out, steps):
    for _ in range(steps):
        tl.store(out, 1.0)


def fault():
    """Why it cannot interpret loops, or ``None``. NumPy 2.4 broke the interpreter of older Tritons."""
    try:
        _loop[(1,)](torch.zeros(1), 2)
    except Exception as error:
        if "0-dimensional" not in str(error):
            raise
        return f"Triton {triton.__version__} cannot interpret loops with this NumPy; install numpy<2.4"
    return None
