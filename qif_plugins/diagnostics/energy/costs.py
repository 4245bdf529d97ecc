"""Energy and memory traffic of spiking networks, from counts of operations.

Per inference and in the arithmetic alone::

    E = MACs · E_MAC + SynOps · E_AC + neuron-steps · E_update
    E_update(LIF) = 1 multiplication + 2 additions: h = β v + x, and the comparison with the threshold
    E_update(QIF) = E_update(LIF) + 1 multiplication + 1 addition: h = (a v + b) v + x
                    + 1 addition without rebound, h = (a max(v, 0) + β) v + x, for the comparison

A MAC is a multiply-accumulate, a SynOp one spike arriving at one target, a neuron-step one neuron updated once;
:mod:`.counting` counts them. The default energies are those of 45 nm CMOS at 32 bit floating point: M. Horowitz,
*Computing's energy problem (and what we can do about it)*, ISSCC 2014, doi 10.1109/ISSCC.2014.6757323. Not included are
biases and normalizations (folded into weights), pooling, additions of branches, and the movement of data, which
:func:`memory_traffic` counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from ...support.names import check_known

__all__ = ["LIF_UPDATES", "MEMORIES", "QIF_MAPS", "Costs", "Energy", "Traffic", "memory_traffic"]

LIF_UPDATES = {"none": (0, 0), "charge": (1, 1), "compare": (1, 2)}
"""Multiplications and additions of a LIF update. ``"charge"`` counts h = β v + x; ``"compare"`` also counts the
comparison with the threshold, as an addition. A reset to a constant is a selection and costs nothing."""

QIF_MAPS = {"parabola": (1, 1, 0), "monotone": (1, 1, 1)}
"""Multiplications, additions and comparisons of QIF's map beyond LIF's. ``"monotone"`` is the map without rebound. A
comparison counts as an addition, provided that LIF's comparison with its threshold is counted."""

MEMORIES = {"8 KB SRAM": 5.0, "32 KB SRAM": 10.0, "1 MB SRAM": 50.0, "DRAM": 650.0}
"""Energy in pJ of one access to 32 bits: half of what Horowitz gives for 64 bits, 10, 20 and 100 pJ for caches of these
sizes and, for DRAM, 1.3 nJ, the lower end of his 1.3 to 2.6 nJ."""


@dataclass(frozen=True)
class Costs:
    """Energies of the operations in pJ.

    Attributes:
        mac: A multiply-accumulate. Default 4.6.
        ac: An accumulate. Default 0.9.
        mult: A multiplication. Default 3.7.
        add: An addition. Default 0.9.
        lif_update: Operations of a LIF update, a key of :data:`LIF_UPDATES`. Default ``"compare"``.
        qif_map: QIF's map, a key of :data:`QIF_MAPS`. Default ``"parabola"``.

    Raises:
        ValueError: An energy that is negative or not finite, or an unknown update or map.
    """

    mac: float = 4.6
    ac: float = 0.9
    mult: float = 3.7
    add: float = 0.9
    lif_update: str = "compare"
    qif_map: str = "parabola"

    def __post_init__(self) -> None:
        for field in fields(self)[:-2]:
            value = getattr(self, field.name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"the energy of {field.name} must be finite and not negative, got {value} pJ")
        check_known("lif_update", LIF_UPDATES, self.lif_update)
        check_known("qif_map", QIF_MAPS, self.qif_map)

    @property
    def lif(self) -> float:
        """Energy in pJ of a neuron-step of LIF."""
        mults, adds = LIF_UPDATES[self.lif_update]
        return mults * self.mult + adds * self.add

    @property
    def qif_extra(self) -> float:
        """Additional energy in pJ of a neuron-step of QIF, for f(v) = (a v + b) v instead of LIF's β v.

        The comparison that bounds a soft reset is not included, as it is needed only after a spike.
        """
        mults, adds, comparisons = QIF_MAPS[self.qif_map]
        return mults * self.mult + (adds + comparisons * (self.lif_update == "compare")) * self.add


@dataclass(frozen=True)
class Energy:
    """Arithmetic energy in pJ, part by part.

    Attributes:
        macs: Energy of multiply-accumulates.
        synops: Energy of accumulates of spikes.
        lif: Energy of neuron updates if every neuron is LIF.
        qif_extra: Additional energy of the updates if every neuron is QIF.
    """

    macs: float
    synops: float
    lif: float
    qif_extra: float

    @classmethod
    def of(cls, macs: float, synops: float, neuron_steps: float, costs: Costs) -> Energy:
        """Compute the energy of these numbers of operations."""
        return cls(macs * costs.mac, synops * costs.ac, neuron_steps * costs.lif, neuron_steps * costs.qif_extra)

    def scaled(self, factor: float) -> Energy:
        """Multiply every part by ``factor``."""
        return Energy(*(factor * part for part in (self.macs, self.synops, self.lif, self.qif_extra)))

    @property
    def total_lif(self) -> float:
        """The whole energy with LIF."""
        return self.macs + self.synops + self.lif

    @property
    def total_qif(self) -> float:
        """The whole energy with QIF."""
        return self.total_lif + self.qif_extra

    @property
    def overhead(self) -> float:
        """Energy that QIF adds, as a fraction of the energy with LIF; NaN if both are 0."""
        if not self.total_lif:
            return math.inf if self.qif_extra else math.nan
        return self.qif_extra / self.total_lif


@dataclass(frozen=True)
class Traffic:
    """32-bit words that move to and from memory.

    Attributes:
        weights: Weights read.
        sums: Input sums of neurons read and written.
        membranes: Membranes read and written, the same for LIF and QIF, whose parameters are constants.
    """

    weights: float
    sums: float
    membranes: float

    def energy(self, access: float) -> float:
        """Compute the energy in pJ, at ``access`` pJ for each word."""
        return access * (self.weights + self.sums + self.membranes)


def memory_traffic(used: float, weights: float, neuron_steps: float, reuse: bool) -> Traffic:
    """Count the words that move to and from memory, for either of two extreme kinds of hardware.

    In both, a neuron-step reads and writes the membrane.

    Args:
        used: Number of SynOps and MACs.
        weights: Number of weights, times the time steps in which they are used.
        neuron_steps: Number of neuron updates.
        reuse: ``False`` for event-driven hardware, where each SynOp and MAC reads its weight, and reads and writes its
            target's sum. ``True`` for hardware that reads each weight once per time step and keeps sums in registers.
    """
    membranes = 2 * neuron_steps
    return Traffic(weights, 0, membranes) if reuse else Traffic(used, 2 * used, membranes)
