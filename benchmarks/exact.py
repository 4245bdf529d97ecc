"""Speed and memory of the exact layers, beside a PyTorch event loop and the reference implementation in JAX.

    python benchmarks/exact.py                            one thread; some ten minutes
    python benchmarks/exact.py --jax PYTHON --spikegd FOLDER
    python benchmarks/exact.py --quick --out /tmp

``PYTHON`` is an interpreter that has JAX and jaxtyping, ``FOLDER`` a checkout of https://github.com/chklos/spikegd, the
code published with arXiv 2309.14523; without them that peer is left out. Each case runs in a process of its own, on one
core, so that its peak memory is its own, which needs Linux. Times are CPU seconds, the least of all repetitions, which
other processes on the machine disturb less than wall time. A neuron-event is one input event processed by one neuron; a
network's are the sum over its layers. Peers get the same numbers, and their spike times are compared with ours. The
results go to ``exact-MACHINE.json``, a plot to ``docs/exact-speed.png``, or beside them with ``--out``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qif_plugins.experiments.bench.machine import machine, machine_name
from qif_plugins.support.files import finite, write_json

HERE = Path(__file__).parent
NETWORKS = ("784-100-10", "700-128-20")
LENGTHS, BATCHES = (100, 1000, 8000), (1, 16, 64, 256)
DURATION = 10.0
LIMIT = 6.0
"""GiB that a peer may need; what needs more is left out, and said so."""
PATIENCE = 300.0
"""Seconds that a case may take in all."""
SECONDS = 0.5
"""Repetitions of one pass take so long, or there are two."""

Problem = tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]


def problem(network: str, spikes: int, batch: int, scale: float = 6.0) -> Problem:
    """Input times and indices, and the weights of each layer; the same for the same arguments."""
    from qif_plugins.exact import QIFLayer, Spikes

    sizes = [int(size) for size in network.split("-")]
    generator = torch.Generator().manual_seed(0)
    times = (torch.rand(batch, spikes, generator=generator, dtype=torch.float64) * DURATION).sort(1)[0]
    indices = torch.randint(0, sizes[0], (batch, spikes), generator=generator)
    weights, received = [], spikes
    for n, m in pairwise(sizes):
        drawn = torch.randn(m, n, generator=generator, dtype=torch.float64) + 0.3
        weights.append(drawn * scale / math.sqrt(max(1, received)))
        layer = QIFLayer(n, m, DURATION)
        layer.weight.data = weights[-1]
        if len(weights) == 1:
            with torch.no_grad():
                received = layer(Spikes(times[:1], indices[:1], n)).times.shape[1]
    return times, indices, weights


def event_loop(times: torch.Tensor, indices: torch.Tensor, weight: torch.Tensor, duration: float) -> torch.Tensor:
    """A QIF layer as one would write it in PyTorch: every event one step for all samples and neurons, by autograd.

    Returns the sum of all spike times, and the number of spikes.
    """
    batch, spikes = times.shape
    p = torch.zeros(batch, len(weight), dtype=torch.float64)
    q, current = torch.ones_like(p), torch.zeros_like(p)
    rows = weight.t()
    total, count = 0.0 * weight.sum(), 0  # differentiable without a spike, too
    now = torch.zeros(batch, 1, dtype=torch.float64)
    for k in range(spikes + 1):
        until = times[:, k : k + 1] if k < spikes else torch.full_like(now, duration)
        e = torch.exp(now - until)
        sigma = 1 - e
        root = (current.abs() + 1e-30).sqrt()
        angle = root * sigma
        positive = current > 0
        c = torch.where(positive, angle.cos(), angle.cosh())
        s = torch.where(positive, angle.sin(), angle.sinh()) / root
        next_p, next_q = (c * p + current * s * q) * e, c * q - s * p
        spiked = next_q < 0
        if bool(spiked.any()):
            i, root_, p_, q_ = current[spiked], root[spiked], p[spiked], q[spiked]
            ratio = root_ * q_ / p_
            zero = (
                torch.where(i > 0, torch.atan2(root_ * q_, p_), torch.atanh(ratio.clamp(-0.999999, 0.999999))) / root_
            )
            start = now.expand(batch, len(weight))[spiked]
            total = total + (start - torch.log1p(-zero)).sum()
            count += int(spiked.sum())
        size = (next_p.abs() + next_q.abs()) * torch.where(spiked, -1.0, 1.0)
        p, q, current = next_p / size, next_q / size, current * e * e
        if k < spikes:
            current = current + rows[indices[:, k]]
        now = until
    return torch.stack([total, total.new_tensor(float(count))])


def least(run: Callable[[], Any]) -> float:
    """CPU seconds."""
    taken, stop = [], time.perf_counter() + SECONDS
    while len(taken) < 2 or time.perf_counter() < stop:
        began = time.process_time()
        run()
        taken.append(time.process_time() - began)
    return min(taken)


def measured(
    forward: Callable[[], torch.Tensor], parameters: list[torch.Tensor], small: Callable[[], torch.Tensor]
) -> dict[str, float]:
    """Forward alone, backward alone, both, and the memory that they need beyond what ``small`` did."""
    small().backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.no_grad():
        forward_s = least(forward)
    backward, both, stop = [], [], time.perf_counter() + SECONDS
    while len(both) < 2 or time.perf_counter() < stop:
        for parameter in parameters:
            parameter.grad = None
        began = time.process_time()
        loss = forward()
        middle = time.process_time()
        loss.backward()
        backward.append(time.process_time() - middle)
        both.append(time.process_time() - began)
        del loss
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"forward_s": forward_s, "backward_s": min(backward), "both_s": min(both), "peak_mib": peak}


def ours(kind: str, network: str, spikes: int, batch: int, path: str | None) -> dict[str, Any]:
    """A network of this package; writes the problem and what came of it to ``path`` for a peer."""
    from qif_plugins.exact import LIFLayer, QIFLayer, Spikes, ThetaLayer

    times, indices, weights = problem(network, spikes, batch, 1.0 if kind == "theta" else 6.0)
    layer = {"lif": LIFLayer, "qif": QIFLayer, "theta": ThetaLayer}[kind]
    net = torch.nn.Sequential(*(layer(w.shape[1], w.shape[0], DURATION) for w in weights))
    for one, weight in zip(net, weights, strict=True):
        one.weight.data.copy_(weight)

    def forward(size: int = batch, length: int = spikes) -> torch.Tensor:
        return net(Spikes(times[:size, :length], indices[:size, :length], net[0].in_features)).first().sum()

    record = measured(forward, list(net.parameters()), lambda: forward(1, 50))
    with torch.no_grad():
        hidden = net[0](Spikes(times, indices, net[0].in_features))
        out = net[1](hidden)
    emitted = (hidden.indices >= 0).sum(1), (out.indices >= 0).sum(1)
    events = batch * spikes * len(weights[0]) + int(emitted[0].sum()) * len(weights[1])
    record |= {"events": events, "hidden_spikes": float(emitted[0].double().mean())}
    if path is not None:
        np.savez(
            path,
            times=times,
            indices=indices,
            hidden=weights[0],
            out=weights[1],
            duration=DURATION,
            steps=spikes + int((emitted[0] + emitted[1]).max()) + 1,
            first=out.first(),
            grad=net[0].weight.grad,
        )
    return record


def first_layer(kind: str, network: str, spikes: int, batch: int) -> dict[str, Any]:
    """The first layer alone: ours, or the event loop in PyTorch."""
    from qif_plugins.exact import QIFLayer, Spikes

    times, indices, (weight, _) = problem(network, spikes, batch)
    layer = QIFLayer(weight.shape[1], weight.shape[0], DURATION)
    layer.weight.data.copy_(weight)

    def forward(size: int = batch, length: int = spikes) -> torch.Tensor:
        some = times[:size, :length], indices[:size, :length]
        if kind == "loop":
            return event_loop(*some, layer.weight, DURATION)[0]
        out = layer(Spikes(*some, layer.in_features))
        return torch.where(out.indices >= 0, out.times, 0.0).sum()

    record = measured(forward, [layer.weight], lambda: forward(1, 50))
    return record | {"total": float(forward().detach()), "events": batch * spikes * len(weight)}


def _stay_on_one_core() -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def child(*words: str, python: str = sys.executable, script: str = __file__, **environment: str) -> dict[str, Any]:
    """Run a case in a process of its own, on one core."""
    alone = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    try:
        done = subprocess.run(
            [python, script, *words],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            env=os.environ | alone | environment,
            preexec_fn=_stay_on_one_core,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {PATIENCE:.0f} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:200]}
    return json.loads(done.stdout.splitlines()[-1])


def reference(network: str, spikes: int, batch: int, python: str, folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Our network and the reference implementation on it, one after the other."""
    with tempfile.TemporaryDirectory() as place:
        path, answer = f"{place}/problem.npz", f"{place}/answer.npz"
        us = child("--case", json.dumps(["ours", "qif", network, spikes, batch, path]))
        them = child(path, answer, str(SECONDS), python=python, script=str(HERE / "exact_jax.py"), PYTHONPATH=folder)
        if "error" not in them:
            with np.load(path) as mine, np.load(answer) as theirs:
                them["largest_difference"] = float(np.abs(mine["first"] - theirs["first"]).max())
                scale = np.abs(mine["grad"]).max()
                them["gradient_difference"] = float(np.abs(mine["grad"] - theirs["grad_hidden"]).max() / scale)
    return us, them


def needs(steps: int, neurons: int, batch: int, numbers: int) -> float:
    """GiB that an event loop differentiated by autograd keeps."""
    return steps * neurons * batch * numbers * 8 / 2**30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    parser.add_argument("--figure", type=Path, help="default: in docs, or beside the results if they go elsewhere")
    parser.add_argument("--quick", action="store_true", help="small cases alone")
    parser.add_argument("--jax", metavar="PYTHON", help="interpreter with JAX and jaxtyping")
    parser.add_argument("--spikegd", metavar="FOLDER", help="checkout of github.com/chklos/spikegd")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.case:
        which, *words = json.loads(arguments.case)
        print(json.dumps({"ours": ours, "layer": first_layer}[which](*words)))
        return 0
    if bool(arguments.jax) != bool(arguments.spikegd):
        parser.error("--jax and --spikegd go together")
    lengths, batches = (LENGTHS[:2], BATCHES[:2]) if arguments.quick else (LENGTHS, BATCHES)
    results: dict[str, Any] = {
        "machine": machine(torch.device("cpu")),
        "command": "python benchmarks/exact.py"
        + " --quick" * arguments.quick
        + " --jax PYTHON --spikegd FOLDER" * bool(arguments.jax),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "measurements": [],
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"exact-{machine_name(torch.device('cpu'))}.json"

    def note(peer: str, network: str, spikes: int, batch: int, record: dict[str, Any]) -> None:
        results["measurements"].append({"peer": peer, "network": network, "spikes": spikes, "batch": batch, **record})
        write_json(path, finite(results))
        print(line(results["measurements"][-1]), flush=True)

    grid = [(network, spikes, batch) for network in NETWORKS for spikes in lengths for batch in batches]
    sizes = [("700-128-20", spikes, 16) for spikes in (300, 3000) if not arguments.quick]
    sizes += [(f"700-{n}-20", 1000, 16) for n in (32, 64, 256, 512)]
    for network, spikes, batch in grid + sizes:
        note("qif", network, spikes, batch, child("--case", json.dumps(["ours", "qif", network, spikes, batch, None])))
    for kind in ("lif", "theta"):
        for spikes in lengths:
            case = ["ours", kind, "700-128-20", spikes, 16, None]
            note(kind, "700-128-20", spikes, 16, child("--case", json.dumps(case)))
    for network, spikes, batch in grid[: len(grid) // 2]:
        for kind in ("layer", "loop"):
            gib = needs(spikes, 100, batch, 26) if kind == "loop" else 0
            record = {"error": f"needs about {gib:.0f} GiB"}
            if gib < LIMIT:
                record = child("--case", json.dumps(["layer", kind, network, spikes, batch]))
            note(kind, network, spikes, batch, record)
    if arguments.jax:
        for network, spikes, batch in grid[: len(grid) // 2]:
            gib = needs(3 * spikes, 110, batch, 40)
            record = {"error": f"needs about {gib:.0f} GiB"}
            if gib < LIMIT:
                us, record = reference(network, spikes, batch, arguments.jax, arguments.spikegd)
                note("qif beside jax", network, spikes, batch, us)
            note("jax", network, spikes, batch, record)
    else:
        print("the reference implementation is left out: no --jax and --spikegd")
    folder = HERE.parent / "docs" if arguments.out == HERE / "results" else arguments.out
    draw(results, arguments.figure or folder / "exact-speed.png")
    return 0


def line(record: dict[str, Any]) -> str:
    head = f"{record['peer']:15s}{record['network']:12s} spikes {record['spikes']:5d}  batch {record['batch']:4d}  "
    if "error" in record:
        return head + record["error"]
    text = head + f"forward {record['forward_s'] * 1e3:9.2f} ms  both {record['both_s'] * 1e3:9.2f} ms"
    if "backward_s" in record:
        text += (
            f"  {record['events'] / record['forward_s'] / 1e6:6.1f} M events/s  backward/forward "
            f"{record['backward_s'] / record['forward_s']:5.2f}  peak +{record['peak_mib']:.0f} MiB"
        )
    else:
        text += f"  differs by {record['largest_difference']:.1e}, gradient by {record['gradient_difference']:.1e}"
    return text


def draw(results: dict[str, Any], path: Path) -> None:
    """Neuron-events a second against events, batch and neurons."""
    from qif_plugins.experiments.figures import colours_of, figure

    records = [
        {**record, "neurons": int(record["network"].split("-")[1])}
        for record in results["measurements"]
        if "error" not in record
    ]

    def rates(peer: str, key: str, wanted: dict[str, Any], passes: str) -> tuple[list[float], list[float]]:
        some = [r for r in records if r["peer"] == peer and all(r[k] == v for k, v in wanted.items())]
        if key == "neurons":
            some = [r for r in some if r["network"].startswith("700-")]
        events = {(r["network"], r["spikes"], r["batch"]): r["events"] for r in records if r["peer"] == "qif"}
        pairs = sorted(
            (r[key], r.get("events", events.get((r["network"], r["spikes"], r["batch"]), 0)) / r[passes] / 1e6)
            for r in some
        )
        return [x for x, _ in pairs], [y for _, y in pairs]

    small, large = {"network": "784-100-10"}, {"network": "700-128-20"}
    shown = (
        ("spikes", "input spikes a sample, batch 16", {"batch": 16}, (small, large)),
        ("batch", "samples a batch, 100 input spikes", {"spikes": 100}, (small, large)),
        ("neurons", "hidden neurons, 1,000 input spikes, batch 16", {"spikes": 1000, "batch": 16}, ({},)),
    )
    peers = (("qif", "QIF"), ("jax", "reference in JAX"), ("loop", "PyTorch event loop (first layer)"))
    colours = colours_of(name for _, name in peers)
    with figure(path, (13, 4.2), dpi=130, grid=True) as drawn:
        panels = drawn.subplots(1, 3, sharey=True)
        for axes, (key, label, fixed, networks) in zip(panels, shown, strict=True):
            for place, network in enumerate(networks):
                for peer, name in peers:
                    if key == "neurons" and peer != "qif":
                        continue
                    for passes, style in (("forward_s", "-"), ("both_s", ":")):
                        x, y = rates(peer, key, fixed | network, passes)
                        if not x:
                            continue
                        which = "forward" if passes == "forward_s" else "forward and gradient"
                        axes.loglog(
                            x, y, style, color=colours[name], marker="os"[place], markersize=3.5,
                            label=f"{name}, {network.get('network', '700-N-20')}, {which}",
                        )  # fmt: skip
            if key != "spikes":
                axes.set_xscale("log", base=2)
            axes.axhline(10, color="0.6", linewidth=1, linestyle="--")
            axes.set_xlabel(label)
        panels[0].set_ylabel("million neuron-events a second, one core")
        handles = {
            text: handle for axes in panels for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        drawn.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize="x-small")
        drawn.suptitle(results["machine"]["cpu"], fontsize="medium")
    print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
