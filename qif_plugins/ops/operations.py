"""Count the operations of a call of the operator, as those of a QIF neuron written in elementwise operations.

==========  =====================================  =========  ========  ===========
a step      written out                            additions  products  comparisons
==========  =====================================  =========  ========  ===========
charge      h = (a (v - u1)) (m - u2) + g x        3          3
bend        m = v < u1 ? u1 : v                                          1
fire        s = h - θ >= 0                         1                    1
hard reset  v = s v_reset + (1 - s) h              2          2
soft reset  v = h - s θ                            1          1
hold        v = v > θ ? θ : v                                        1
==========  =====================================  =========  ========  ===========

The bend is that of a map without rebound; with rebound m is v and costs nothing. The hold is that of a soft reset
without rebound. A subtraction counts as an addition, a
division as a product, a selection as nothing. The charge has two operations more than LIF's
v + (x - (v - v_reset)) / τ, without rebound three. The backward pass is counted as :mod:`.contract` writes it. A step
that starts from the membrane before its reset (``pre_reset``) repeats a reset that was counted before.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from .contract import Shape
from .library import multi_step


class Work(NamedTuple):
    """Numbers of elementwise operations."""

    additions: int = 0
    products: int = 0
    comparisons: int = 0

    def __add__(self, other: Any) -> Work:
        return Work(*map(sum, zip(self, other, strict=True)))

    def __mul__(self, times: Any) -> Work:
        return Work(*(times * count for count in self))


_CHARGE_AND_FIRE = Work(4, 3, 1)
_BEND = Work(0, 0, 1)
_RESET = {False: Work(2, 2), True: Work(1, 1)}
"""The resets, by whether they are soft."""
_BACKWARD = {False: Work(6, 4, 2), True: Work(7, 4, 2)}
"""A step back whose reset passes no gradient to the spike, without w(h)."""
_HELD = Work(1, 0, 2)
"""The hold again, and whether it acted."""
_THROUGH_RESET = {False: Work(6, 4), True: Work(1, 1)}
_SURROGATE = {
    Shape.WINDOW: Work(0, 1, 2),
    Shape.ATAN: Work(2, 3),
    Shape.SIGMOID: Work(3, 5),  # the exponential as one
    Shape.FAST_SIGMOID: Work(2, 3),
    Shape.GAUSSIAN: Work(2, 4, 1),  # the exponential as one
}
_NUMBERS = {
    False: (Work(3, 2), Work(2, 2), Work(2, 2), Work(1), Work(2, 1), Work(1, 1)),
    True: (Work(3, 2), Work(2, 2), Work(2, 2), Work(2), Work(), Work(1, 1)),
}
"""The gradients of a, u1, u2, v_threshold, v_reset and input_gain, summed over the steps."""
_INITIAL = Work(3, 2)
"""The gradient of the membrane before the first step."""
_BENT_U1 = Work(2)
"""The gradient of u1 without rebound has (m - u2) + (m - v) for v - u2."""


def work(operator: Any, args: Any, kwargs: Any) -> Work:
    """Count the operations of a call of the operator or of its backward pass."""
    values = given(operator, args, kwargs)
    soft = bool(values["soft"])
    bend = Work() if values["rebound"] else _BEND
    if operator is multi_step:
        return (_CHARGE_AND_FIRE + bend + _RESET[soft] + (bend if soft else Work())) * values["x_seq"].numel()
    h_seq: Tensor = values["h_seq"]
    step = _BACKWARD[soft] + bend + _SURROGATE[Shape(values["shape"])]
    held = soft and not values["rebound"]
    step += _HELD if held else Work()
    if not values["detach_reset"]:
        # Of a hard reset the map at h, which without rebound counts as the threshold where it is above that.
        step += _THROUGH_RESET[soft] + (Work() if soft else bend * 2)
    neurons = h_seq.numel() // max(h_seq.shape[0], 1)
    once = _INITIAL + bend if values["needs_v"] else Work()
    if any(values["needs"][:2]):
        step += bend
    if values["needs"][1] and not values["rebound"]:
        step += _BENT_U1
    if values["needs"][3] and held:
        step += Work(1)  # its sign
    for cost, needed in zip(_NUMBERS[soft], values["needs"], strict=True):
        if needed and any(cost):
            step += cost
            once += Work(1)  # summed over the neurons
    return step * h_seq.numel() + once * neurons


def given(operator: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Return the arguments of a call by name."""
    names = (argument.name for argument in operator._schema.arguments)
    return {**dict(zip(names, args, strict=False)), **kwargs}
