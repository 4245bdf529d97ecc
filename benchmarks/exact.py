"""Speed and memory of the exact layers, beside a straightforward vectorised PyTorch event loop.

    python benchmarks/exact.py --out runs/benchmarks          one thread; a few minutes
    python benchmarks/exact.py --quick

Each case runs in a process of its own, so that its peak memory is its own. Times are CPU seconds of one thread, which
other processes on the machine disturb less than wall time. A neuron-event is one event processed by one neuron; a
network's are the sum over its layers. ``exact.json`` and a table are written.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

NETWORKS = {"784-100-10": (784, 100, 10), "700-128-20": (700, 128, 20)}
DURATION = 10.0


def inputs(channels: int, spikes: int, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    times = (torch.rand(batch, spikes, generator=generator, dtype=torch.float64) * DURATION).sort(1)[0]
    return times, torch.randint(0, channels, (batch, spikes), generator=generator)


def weights(channels: int, neurons: int, spikes: int, scale: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(neurons, channels, generator=generator, dtype=torch.float64) + 0.3
    return drawn * scale / math.sqrt(spikes)


def event_loop(times: torch.Tensor, indices: torch.Tensor, weight: torch.Tensor, duration: float) -> torch.Tensor:
    """A QIF layer as one would write it in PyTorch: every event one step for all samples and neurons, by autograd.

    Returns the sum of all spike times, and the number of spikes.
    """
    batch, spikes = times.shape
    p = torch.zeros(batch, len(weight), dtype=torch.float64)
    q, current = torch.ones_like(p), torch.zeros_like(p)
    rows = weight.t()
    total, count = torch.zeros((), dtype=torch.float64), 0
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


def best(run, repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        began = time.process_time()
        run()
        seconds.append(time.process_time() - began)
    return min(seconds)


def case(kind: str, network: str, spikes: int, batch: int, repeats: int) -> dict[str, float | str | int]:
    """Measure one case in this process."""
    from qif_plugins.exact import LIFLayer, QIFLayer, Spikes, ThetaLayer

    torch.set_num_threads(1)
    channels, hidden, classes = NETWORKS[network]
    times, indices = inputs(channels, spikes, batch)
    scale = 1.0 if kind == "theta" else 6.0
    first = weights(channels, hidden, spikes, scale)
    record: dict[str, float | str | int] = {"kind": kind, "network": network, "spikes": spikes, "batch": batch}
    if kind in ("loop", "layer"):
        # One layer: the event loop in PyTorch against ours, on the same numbers.
        def forward(grad: bool, times: torch.Tensor = times, indices: torch.Tensor = indices) -> torch.Tensor:
            weight = first.clone().requires_grad_(grad)
            if kind == "loop":
                total, count = event_loop(times, indices, weight, DURATION)
                record["spikes_out"] = int(count)
            else:
                layer = QIFLayer(channels, hidden, DURATION)
                layer.weight.data = first.clone()
                layer.weight.requires_grad_(grad)
                out = layer(Spikes(times, indices, channels))
                total = torch.where(out.indices >= 0, out.times, 0.0).sum()
                record["spikes_out"] = int((out.indices >= 0).sum())
            record["total"] = float(total.detach())
            return total

        events = batch * spikes * hidden
    else:
        layer = {"lif": LIFLayer, "qif": QIFLayer, "theta": ThetaLayer}[kind]
        net = torch.nn.Sequential(layer(channels, hidden, DURATION), layer(hidden, classes, DURATION))
        net[0].weight.data = first
        middle = net[0](Spikes(times[:1], indices[:1], channels)).times.shape[1]
        net[1].weight.data = weights(hidden, classes, max(1, middle), scale)
        inner = net[0](Spikes(times, indices, channels))
        events = batch * spikes * hidden + int((inner.indices >= 0).sum()) * classes
        record["spikes_hidden"] = int((inner.indices >= 0).sum()) / batch
        del inner

        def forward(grad: bool, times: torch.Tensor = times, indices: torch.Tensor = indices) -> torch.Tensor:
            with torch.set_grad_enabled(grad):
                return net(Spikes(times, indices, channels)).first().sum()

    # A small one first, so that neither loading the compiled code nor its memory is counted.
    forward(True, times[:1, :50], indices[:1, :50]).backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    record["forward_s"] = best(lambda: forward(False), repeats)
    backward = []
    for _ in range(repeats):
        loss = forward(True)
        began = time.process_time()
        loss.backward()
        backward.append(time.process_time() - began)
    record["backward_s"] = min(backward)
    record["forward_events_per_s"] = events / record["forward_s"]
    record["backward_over_forward"] = record["backward_s"] / record["forward_s"]
    record["peak_mib"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder of exact.json")
    parser.add_argument("--quick", action="store_true", help="small cases alone")
    parser.add_argument("--repeats", type=int, default=3, help="best of so many")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(case(*json.loads(arguments.case), arguments.repeats)))
        return 0
    lengths, batches = ((100, 1000), (1, 16)) if arguments.quick else ((100, 1000, 8000), (1, 16, 64, 256))
    cases = [("qif", net, k, b) for net in NETWORKS for k in lengths for b in batches]
    cases += [(kind, "700-128-20", k, 16) for kind in ("lif", "theta") for k in lengths]
    cases += [(kind, "784-100-10", k, b) for k in lengths[:2] for b in (1, 64) for kind in ("loop", "layer")]
    records = []
    for one in cases:
        words = [sys.executable, __file__, "--case", json.dumps(one), "--repeats", str(arguments.repeats)]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        record = json.loads(done.stdout.splitlines()[-1])
        records.append(record)
        print(
            f"{record['kind']:6s}{record['network']:12s} spikes {record['spikes']:5d}  batch {record['batch']:4d}  "
            f"forward {record['forward_s'] * 1e3:9.2f} ms  {record['forward_events_per_s'] / 1e6:7.1f} M events/s  "
            f"backward/forward "
            f"{record['backward_over_forward']:5.2f}  peak +{record['peak_mib']:.0f} MiB",
            flush=True,
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "exact.json").write_text(json.dumps(records, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
