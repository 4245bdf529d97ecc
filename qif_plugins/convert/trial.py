"""Run a copy of a model on an example, and observe its neurons without any other effect."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import inspect
import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ..support.randomness import unchanged_randomness
from .hosts import Host


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a model.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
        drive: Function that takes the model and the positional arguments, and runs the model. ``None`` (default) calls
            the model.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    drive: Callable[..., Any] | None = None

    @staticmethod
    def of(example: Any, model: nn.Module) -> Call:
        """Make a call from ``example_input``: a tuple of arguments, a dict of arguments by name, or one argument.

        A dict counts as arguments by name only if all of its keys are names of the model's arguments. A Call is
        returned as it is.
        """
        if isinstance(example, Call):
            return example
        if isinstance(example, tuple):
            return Call(example)
        parameters = inspect.signature(model.forward).parameters.values()
        names = {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}
        if isinstance(example, Mapping) and example and example.keys() <= names:
            return Call((), example)
        return Call((example,))

    def copied(self) -> Call:
        """Copy the arguments, since a model may write into them.

        Raises:
            ValueError: An argument cannot be copied.
        """
        try:
            args, kwargs = tree_map(
                lambda value: value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value),
                (tuple(self.args), dict(self.kwargs)),
            )
        except Exception as error:
            raise ValueError(f"an argument cannot be copied: {type(error).__name__}: {error}") from error
        return Call(args, kwargs, self.drive)

    def run(self, model: nn.Module) -> Any:
        """Run the model, and return its output."""
        return self.drive(model, *self.args) if self.drive else model(*self.args, **self.kwargs)


class _UnchangedGenerators(TorchDispatchMode):
    """Restores on exit the random generators that were passed to operators inside."""

    def __init__(self) -> None:
        super().__init__()
        self.before: dict[torch.Generator, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        generator = (kwargs or {}).get("generator")
        if generator is not None and generator not in self.before:
            self.before[generator] = generator.get_state()
        return func(*args, **(kwargs or {}))

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for generator, state in self.before.items():
            generator.set_state(state)


_ON_TRIAL = contextvars.ContextVar("on_trial", default=False)


def on_trial() -> bool:
    """Return whether a copy of a model is running now, inside :func:`trial`."""
    return _ON_TRIAL.get()


@contextlib.contextmanager
def trial(model: nn.Module, hosts: Sequence[Host]) -> Iterator[nn.Module]:
    """Yield a copy of the model, in eval mode and without the user's hooks.

    Inside the ``with`` block nothing is printed, new neurons are not added to a host's own lists, and random number
    generators keep their state.

    Raises:
        ValueError: The model cannot be copied.
    """
    token = _ON_TRIAL.set(True)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            # Warnings that are given only once must appear in the user's own run.
            stack.enter_context(warnings.catch_warnings())
            stack.enter_context(unchanged_randomness())
            for host in hosts:
                stack.enter_context(host.unlisted())
            twin = _copy(model).eval()
            stack.enter_context(_UnchangedGenerators())
            yield twin
    finally:
        _ON_TRIAL.reset(token)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel, DataParallel and torch.compile."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def reset_state(model: nn.Module) -> None:
    """Reset the membranes of the neurons of either host."""
    for module in model.modules():
        # Neurons are recognised by SpikingJelly's memories and snnTorch's reset_mem.
        clear: Any = getattr(module, "reset" if hasattr(module, "_memories") else "reset_mem", None)
        if callable(clear):
            clear()


def _copy(model: nn.Module) -> nn.Module:
    # States left by a forward pass have a graph, which deepcopy refuses: the copy gets them detached.
    states = [t for m in model.modules() for t in tree_leaves(dict(vars(m))) if isinstance(t, Tensor) and not t.is_leaf]
    try:
        with _without_hooks(model):
            return copy.deepcopy(model, {id(state): state.detach().clone() for state in states})
    except Exception as error:
        raise ValueError(
            f"the model cannot be copied to follow the example input through it: {type(error).__name__}: {error}. "
            "Without one, the order of registration decides."
        ) from error


@contextlib.contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """Hide the user's hooks from a copy that is made inside, so that monitors do not see it; keep PyTorch's own."""
    attached = [
        (vars(module), kind, vars(module)[kind])
        for module in model.modules()
        for kind in ("_forward_pre_hooks", "_forward_hooks")
    ]
    try:
        for attributes, kind, hooks in attached:
            attributes[kind] = type(hooks)((key, hook) for key, hook in hooks.items() if _of_torch(hook))
        yield
    finally:
        for attributes, kind, hooks in attached:
            attributes[kind] = hooks


def _of_torch(hook: Any) -> bool:
    # An object, such as that of a weight norm, has its class's module.
    return str(getattr(hook, "__module__", "")).split(".")[0] == "torch"
