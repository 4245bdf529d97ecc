"""Kernels of the forward and backward pass, several implementations behind one registered operator.

Importing this package registers the operator, which a program saved by ``torch.export.save`` needs where it is loaded.
"""

from . import library

__all__ = ["library"]
