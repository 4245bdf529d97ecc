"""Firing rates, where training code looks for them."""

from ..spiking import FiringRates

__all__ = ["FiringRates"]
