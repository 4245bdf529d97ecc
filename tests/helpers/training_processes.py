"""Trainings in processes of their own, for test_training_processes.py: killed ones, and two at once.

One import serves them all: they are forked before anything here has started a thread.

    python training_processes.py FOLDER
"""

import hashlib
import json
import os
import pickle
import signal
import socket
import sys
import traceback
from pathlib import Path

import numpy
import sklearn.datasets  # noqa: F401  here, so that the processes need not
import torch
import torch._dynamo
from torchvision.datasets import CIFAR10

from qif_plugins import cli
from qif_plugins.experiments.training import Batches, Trainer
from qif_plugins.experiments.training.config import from_dict
from qif_plugins.experiments.training.progress import Progress
from qif_plugins.experiments.training.session import build_model, functional, make_optimizer, prepare

KILLS = [("step", 1), ("step", 4), ("saving", 2), ("saving", 5), ("term", 3), ("step", 2)]
"""Where each run in turn is ended, counted from its start: after a step, or between writing a file and renaming it."""

RUN = [
    "--set", "training.epochs=3", "--set", "training.batch_size=8", "--set", "training.save_every=2",
    "--set", "data.steps=2", "--set", "data.workers=0", "--set", "model.name=convnet", "--set", "model.widths=[4, 4]",
    "--set", "neuron.backend=torch", "--set", "training.threads=1", "--quiet", "--no-tensorboard",
]  # fmt: skip
PAIR = [
    "train", "--config", "digits", "--set", "training.epochs=1", "--set", "training.batch_size=150", "--set",
    "model.norm=none", "--set", "model.layers=2", "--set", "neuron.backend=torch", "--quiet", "--no-tensorboard",
]  # fmt: skip


def write_cifar10(folder, images_a_file=8):
    """The files of CIFAR-10 with other pictures in them; torchvision is told their checksums."""
    base = folder / CIFAR10.base_folder
    base.mkdir(parents=True)
    random = numpy.random.RandomState(0)

    def write(name, content):
        (base / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((base / name).read_bytes()).hexdigest()]

    def pictures():
        pixels = random.randint(0, 256, (images_a_file, 3072), dtype=numpy.uint8)
        return {"data": pixels, "labels": random.randint(0, 10, images_a_file).tolist()}

    CIFAR10.train_list = [write(f"data_batch_{number}", pictures()) for number in range(1, 6)]
    CIFAR10.test_list = [write("test_batch", pictures())]
    meta = write("batches.meta", {"label_names": [f"class {number}" for number in range(10)]})
    CIFAR10.meta = {"filename": meta[0], "key": "label_names", "md5": meta[1]}


def forked(work):
    """A process that does ``work``; its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        status = work() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def ended(child):
    """How a process ended: its status, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def end_at(kind, number):
    """Have this process ended at a place."""
    left = [number]

    def count(at, by):
        left[0] -= at == kind
        if at == kind and left[0] == 0:
            os.kill(os.getpid(), by)

    def on_step(self, trainer, measured, before=Progress.on_step):
        before(self, trainer, measured)
        count("step", signal.SIGKILL)
        count("term", signal.SIGTERM)

    def fsync(file, before=os.fsync):
        before(file)
        count("saving", signal.SIGKILL)

    Progress.on_step, os.fsync = on_step, fsync


def killed_and_resumed(folder):
    """One run left alone, and one that is ended again and again."""
    command = ["train", "--config", "cifar10", "--set", f"data.folder={folder / 'cifar10'}", *RUN]

    def resume(place=None):
        if place:
            end_at(*place)
        return cli.main([*command, "--out", str(folder / "killed"), "--resume"])

    whole = ended(forked(lambda: cli.main([*command, "--out", str(folder / "whole")])))
    ends = [ended(forked(lambda place=place: resume(place))) for place in KILLS]
    return {"whole": whole, "ends": ends, "finished": ended(forked(resume))}


def double_losses():
    """Losses of a network with tdBN in float64, where rounding flips no spike; its statistics over all processes."""
    config = from_dict(
        {
            "data": {"name": "digits", "steps": 2},
            "model": {"name": "perceptron", "layers": 3, "width": 16},
            "neuron": {"name": "qif", "backend": "torch"},
            "training": {"sync_batch_norm": True},
        }
    )
    model = build_model(config, (1, 8, 8), 10).double()
    x, labels = next(prepare(config)[1].train.epoch(0))
    batches = Batches.of(x.double(), labels, batch_size=25, seed=1)

    def loss(model, batch):
        return torch.nn.functional.cross_entropy(model(batch[0].expand(2, *batch[0].shape)).mean(0), batch[1])

    losses = []
    trainer = Trainer(
        model, make_optimizer(config.optimizer, model), loss, batches, test=batches, epochs=3,
        reset=functional.reset_net, on_step=lambda trainer, measured: losses.append(measured),
    )  # fmt: skip
    trainer.fit()
    drop_times = [{k: v for k, v in row.items() if k != "seconds"} for row in trainer.history]
    return trainer.main, {"steps": losses, "history": drop_times}


def pair(folder, processes):
    """The same training in so many processes of one group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def work(rank):
        if processes > 1:
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            os.environ.update({k: str(v) for k, v in ranks.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        status = cli.main([*PAIR, "--out", str(folder / f"of-{processes}")])
        main, losses = double_losses()
        if main:
            (folder / f"double-{processes}.json").write_text(json.dumps(losses))
        return status

    children = [forked(lambda rank=rank: work(rank)) for rank in range(processes)]
    return [ended(child) for child in children]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    write_cifar10(folder / "cifar10")
    report = {"killed": killed_and_resumed(folder), "one": pair(folder, 1), "two": pair(folder, 2)}
    (folder / "report.json").write_text(json.dumps(report))
