"""The reference implementation in JAX on one problem; ``benchmarks/exact.py --jax ... --spikegd ...`` calls this.

It needs JAX, jaxtyping and a checkout of https://github.com/chklos/spikegd (the code published with arXiv 2309.14523)
on ``PYTHONPATH``, and nothing of this package. The reference simulates all neurons of a network in one ``lax.scan``
over input and network spikes, vmapped over the batch. Here it is compiled once for the problem's exact number of
events, in float64, with one column of input weights for each input spike where those are fewer than inputs.
"""

import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from spikegd.qif import QIFNeuron

jax.config.update("jax_enable_x64", True)
neuron = QIFNeuron()


def first_spikes(hidden, out, times, indices, config):
    """One sample: the time to first spike of each output neuron, or its first pseudospike."""
    n_hidden, n_out = hidden.shape[0], out.shape[0]
    if len(times) < hidden.shape[1]:
        hidden, indices = hidden[:, indices], jnp.arange(len(times))
    inputs = jnp.concatenate([hidden, jnp.zeros((n_out, hidden.shape[1]))])
    network = jnp.zeros((n_hidden + n_out, n_hidden + n_out)).at[n_hidden:, :n_hidden].set(out)
    rest = jnp.zeros((2, n_hidden + n_out))
    t, from_input, neurons, states = neuron.event(rest, network, inputs, (times, indices), config)
    end = states[jnp.sum(neurons >= 0)]
    rates = neuron.construct_ratefn(end[:, :n_hidden])(0.0)
    pseudo = neuron.t_pseudo(end[:, n_hidden:], neuron.linear(rates, out), 1, config)
    own = (neurons == n_hidden + jnp.arange(n_out)[:, None]) & ~from_input
    return jnp.where(own.any(1), t[own.argmax(1)], pseudo)


def main():
    problem, result, seconds = sys.argv[1:4]
    with np.load(problem) as file:
        hidden, out, times, indices = (jnp.asarray(file[name]) for name in ("hidden", "out", "times", "indices"))
        config = {"K": int(file["steps"]), "T": float(file["duration"])}

    def batch(hidden, out):
        return jax.vmap(lambda t, i: first_spikes(hidden, out, t, i, config))(times, indices)

    forward = jax.jit(lambda *weights: batch(*weights).sum())
    gradient = jax.jit(jax.value_and_grad(lambda *weights: batch(*weights).sum(), argnums=(0, 1)))
    record = {"jax": jax.__version__}
    for name, run in (("forward", forward), ("both", gradient)):
        began = time.perf_counter()
        jax.block_until_ready(run(hidden, out))
        record[f"{name}_compile_s"] = time.perf_counter() - began
        taken, stop = [], time.perf_counter() + float(seconds)
        while len(taken) < 2 or time.perf_counter() < stop:
            began = time.process_time()
            jax.block_until_ready(run(hidden, out))
            taken.append(time.process_time() - began)
        record[f"{name}_s"] = min(taken)
    _, (grad_hidden, grad_out) = gradient(hidden, out)
    np.savez(result, first=jax.jit(batch)(hidden, out), grad_hidden=grad_hidden, grad_out=grad_out)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
