"""Training of spiking networks: ``qif train`` and ``qif evaluate``, and the engine below them."""

from .batches import Batches, seed_of
from .diagnosis import NonFiniteError
from .engine import Store, Trainer
from .firing import FiringRates, spiking_layers

__all__ = ["Batches", "FiringRates", "NonFiniteError", "Store", "Trainer", "seed_of", "spiking_layers"]
