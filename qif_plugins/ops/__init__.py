"""The forward and the backward kernel, once per implementation, behind one registered operator."""

from .backends import available_backends, choose_backend, unavailable_reason

__all__ = ["available_backends", "choose_backend", "unavailable_reason"]
