"""Firing rates, where training code looks for them."""

from ...diagnostics.spiking import FiringRates

__all__ = ["FiringRates"]
