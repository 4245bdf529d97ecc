"""``qif evaluate``: accuracy and loss of a checkpoint, and the firing rate of each layer."""

from __future__ import annotations

import argparse
from dataclasses import replace

from ..experiments.checkpoints import load_checkpoint
from ..experiments.training.config import Config, from_dict
from ..experiments.training.session import make_trainer, on_other_data, prepare
from ..support.text import text_table


def run(arguments: argparse.Namespace) -> int:
    """Evaluate on the test samples, and print."""
    content = load_checkpoint(arguments.checkpoint)
    trained = from_dict(content["config"], arguments.checkpoint)
    config = _changed(on_other_data(trained, arguments.data, arguments.data_folder), arguments)
    record = content["data"] if config.data.name == trained.data.name else None
    model, task = prepare(config, record, ("pass --data-folder with their folder", ""), train=False)
    trainer = make_trainer(config, model, task)
    trainer.load_model(content["state"], str(arguments.checkpoint))
    row = trainer.evaluate(task.test)
    if not trainer.main:
        return 0
    state = content["state"]
    print(f"{arguments.checkpoint}: {config.model['name']} with {config.neuron.get('name', 'qif')}, T = ", end="")
    print(f"{config.data.steps}, after epoch {state['epoch']}" + f" and {state['step']} steps" * (state["step"] > 0))
    print(
        f"{config.data.name}, {task.test.count} test samples: accuracy {row['accuracy']:.2%}, loss {row['loss']:.4f}\n"
    )
    rows = [(name, f"{rate:.4f}") for name, rate in trainer.rates.items()]
    print(text_table(("layer", "spikes/step"), [*rows, ("all", f"{row.get('rate', float('nan')):.4f}")]))
    return 0


def _changed(config: Config, arguments: argparse.Namespace) -> Config:
    data = config.data if arguments.workers is None else replace(config.data, workers=arguments.workers)
    training = replace(config.training, accumulation=1)
    if arguments.batch_size is not None:
        training = replace(training, batch_size=arguments.batch_size)
    return replace(config, data=data, training=training)
