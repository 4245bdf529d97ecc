"""Train spiking networks: ``qif train`` and ``qif evaluate``, and the trainer that they use."""

from .batches import Batches
from .diagnosis import NonFiniteError
from .engine import Store, Trainer
from .firing import FiringRates

__all__ = ["Batches", "FiringRates", "NonFiniteError", "Store", "Trainer"]
