"""Run a model to observe its layers, and restore it afterwards."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..convert.rates import has_values
from ..convert.trial import reset_state
from ..support.randomness import unchanged_randomness

Batches = Iterable[Any] | Tensor | Callable[[nn.Module], Any]


@contextlib.contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Restore the model's parameters, buffers, membranes, modes and hooks after the block, and random generators, too.

    Raises:
        ValueError: The model has lazy parameters, which its first forward would create, or is on the meta device.
    """
    modules = list(model.modules())
    if any(nn.parameter.is_lazy(p) for p in model.parameters()):
        raise ValueError("the model has lazy layers without parameters yet; run one batch through it first")
    if not has_values(model):
        raise ValueError(
            "the model is on the meta device and cannot run; give it values first, by to_empty and a checkpoint"
        )
    saved = [(module, _shallow(module.__dict__)) for module in modules]
    tensors = [tensor for _, state in saved for tensor in _state_tensors(state)]
    copies = [(tensor, tensor.detach().clone()) for tensor in tensors if not tensor.is_inference()]
    try:
        with unchanged_randomness(), _eager():
            yield
    finally:
        with torch.no_grad():
            for tensor, copy in copies:
                # By value: batch norm does not count the changes of its running statistics.
                if not torch.equal(tensor, copy):
                    tensor.detach().copy_(copy)
        for module, state in saved:
            module.__dict__.clear()
            module.__dict__.update(state)


def _shallow(state: dict[str, Any]) -> dict[str, Any]:
    # One level down: parameters, buffers, submodules, hooks and the hosts' memories are dictionaries.
    return {name: value.copy() if isinstance(value, dict) else value for name, value in state.items()}


def _state_tensors(state: dict[str, Any]) -> Iterator[Tensor]:
    for name in ("_buffers", "_memories"):
        yield from (value for value in state.get(name, {}).values() if isinstance(value, Tensor))


def _eager() -> contextlib.AbstractContextManager[Any]:
    """Run compiled submodules as written, so that hooks and observers see them."""
    stance = getattr(torch.compiler, "set_stance", None)
    if stance is None or "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    return stance("force_eager")


def batches_of(batches: Any) -> Iterable[Any]:
    """Return ``batches`` as an iterable of batches; a single batch becomes a tuple of length 1."""
    if isinstance(batches, Tensor) or _is_pair(batches):
        return (batches,)
    if not isinstance(batches, Iterable):
        raise TypeError(
            f"batches must be an iterable of tensors or of (tensor, target), or a callable that runs the model, got "
            f"{type(batches).__name__}"
        )
    return batches


def run_all(model: nn.Module, batches: Batches, steps: int, purpose: str) -> int:
    """Run the model on every batch, each from a reset state, or call ``batches`` with it; return the number of runs.

    Raises:
        ValueError: There is no batch.
        TypeError: A batch is neither a tensor nor a sequence that begins with one, or the model takes more arguments.
    """
    if callable(batches) and not isinstance(batches, nn.Module):
        batches(model)
        return 1
    count = 0
    for batch in batches_of(batches):
        run_on(model, input_of(model, batch), steps, f"batch {count}")
        count += 1
    if not count:
        raise ValueError(f"there is no batch to {purpose} on; an iterator that was used before is empty")
    return count


def _is_pair(batch: Any) -> bool:
    """Return whether this is one (input, target) rather than two batches: the target is integer, the input is not."""
    if not (isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)):
        return False
    return batch[0].is_floating_point() and not batch[1].is_floating_point()


def run_on(model: nn.Module, x: Tensor, steps: int, which: str = "the batch") -> list[Any]:
    """Reset the state, call the model ``steps`` times on ``x``, and return the outputs.

    Args:
        model: The model.
        x: Its input.
        steps: How often to call it.
        which: Name of the batch that ``x`` is from, for errors. Default ``"the batch"``.

    Raises:
        TypeError: The model cannot be called on ``x`` alone.
        ValueError: The model raised it; the message adds the shape, the dtype and the device of ``x``. The same holds
            for a ``RuntimeError`` and an ``IndexError``.
    """
    reset_state(model)
    try:
        return [model(x) for _ in range(steps)]
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        if type(error) not in (TypeError, ValueError, RuntimeError, IndexError):
            raise  # a subclass says more, such as too little memory
        dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
        cast = f" The model's parameters are {dtypes.pop()}." if len(dtypes - {x.dtype}) == len(dtypes) == 1 else ""
        raise type(error)(
            f"calling the model on the input of {which}, a tensor {list(x.shape)} of {x.dtype} on {x.device}, failed: "
            f"{str(error).rstrip('.')}.{cast} A sequence has its time steps in dimension 0, [T, N, ...]. If the model "
            "takes more than one argument, pass a callable that takes the model and runs it, such as "
            "lambda model: model(a, b)."
        ) from error


def input_of(model: nn.Module, batch: Any) -> Tensor:
    """Take the input tensor out of a batch and move it to the model's device.

    Raises:
        TypeError: The batch is neither a tensor nor a tuple or list that begins with one.
        ValueError: The batch is on the meta device.
    """
    x = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(x, Tensor):
        first = f" that begins with a {type(x).__name__}" if x is not batch else ""
        first += "; torch.as_tensor(array) makes one" if hasattr(x, "__array__") else ""
        raise TypeError(
            f"a batch must be a tensor, or a tuple or list that begins with one, got a {type(batch).__name__}{first}. "
            "For anything else pass a callable that takes the model and runs it, such as "
            "lambda model: model(**inputs)."
        )
    if x.is_meta:
        raise ValueError("the batch is on the meta device and has no values; pass one with values")
    device = next((t.device for t in (*model.parameters(), *model.buffers())), x.device)
    return x.to(device)


def check_steps(steps: int) -> None:
    """Raise a ValueError unless ``steps`` is a whole number above 0."""
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a whole number of at least 1, got {steps!r}")
