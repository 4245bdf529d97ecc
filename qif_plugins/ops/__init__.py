"""The forward and the backward kernel, once per implementation, behind one registered operator.

Importing this package registers the operator, which a program saved by ``torch.export.save`` needs where it is loaded.
"""

from . import library
from .backends import available_backends, choose_backend, unavailable_reason

__all__ = ["available_backends", "choose_backend", "library", "unavailable_reason"]
