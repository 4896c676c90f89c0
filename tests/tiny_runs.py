"""Runs of tiny networks on the disk: left by train.py, or as it leaves them, without training."""

import torch
from conftest import TINY, tiny_model

import train
from toolkit import cli
from toolkit.checkpoints import RUNS, Progress, Saver, load_state
from toolkit.weights import save_generator


def saved_args(*argv):
    """The flags that a state of a tiny run holds."""
    parser = cli.Parser()
    groups = ("data", "network", "loss", "optim", "transfer", "run", "speed")
    for group in groups:
        getattr(cli, f"add_{group}_flags")(parser)
    return cli.plain_flags(parser.parse_args(["--dataset_name", "tiny", *TINY, *map(str, argv)]))


def save_run(name="tiny", epochs=2, argv=(), **changes):
    """A whole run: states, generator files, two steps an epoch; changes: of conftest.tiny_model."""
    folder = RUNS / name
    folder.mkdir(parents=True)
    saved = saved_args(*argv)
    model = tiny_model(**changes)
    config = model.nets["G_AB"].config
    size = (saved["img_height"], saved["img_width"])
    metadata = {"stage": "train", "run_name": name, "dataset_name": "tiny", "size": list(size)}
    metadata["data_root"] = saved["data_root"]
    saver = Saver(folder, {"stage": "train", "args": saved}, metadata, checkpoint_interval=1)
    noise = torch.Generator().manual_seed(1)
    for epoch in range(1, epochs + 1):
        for _ in range(2):
            real_A, real_B = torch.rand(2, 2, config.channels, *size, generator=noise) * 2 - 1
            model.step(real_A, real_B)
        saver.save(model, Progress(epoch, 2 * epoch), {"sums": {}, "count": 0}, lambda: None)
    return model


def save_pair(name="pair", size=(16, 16), **nets):
    """Generator files alone, each of its own network."""
    folder = RUNS / name
    folder.mkdir(parents=True)
    for letters, net in nets.items():
        metadata = {"direction": f"{letters[2]}to{letters[3]}", "size": list(size), "dataset_name": "tiny"}
        save_generator(folder / f"{letters}.safetensors", net, metadata)


def run_tiny(*argv):
    """Train on the data set named tiny, for real."""
    train.main(["--dataset_name", "tiny", *TINY, *map(str, argv)])


def state_of(name, file="latest.pt"):
    """A whole state of a run."""
    return load_state(RUNS / name / file)
