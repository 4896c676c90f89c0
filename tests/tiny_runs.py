"""Runs of tiny networks on the disk: left by train.py, or as it leaves them, without training."""

import dataclasses

import torch
from conftest import TINY, tiny_model

import train
from models import Direction
from toolkit.checkpoints import RUNS, CheckpointSaver, load_state
from toolkit.cli import plain_args
from toolkit.weights import save_generator


def saved_args(*argv):
    """The options that a state of a tiny run contains."""
    parser = train.make_parser()
    return plain_args(parser.parse_args(["--dataset_name", "tiny", *TINY, *map(str, argv)]))


def state_of_model(model, args, epoch, step):
    """A state as train.py saves it, of a model that was trained otherwise."""
    meter = {"sums": {}, "count": 0}
    config = {name: dataclasses.asdict(net.config) for name, net in model.networks.items()}
    progress = {"epoch": epoch, "step": step, "step_in_epoch": 0, "micro_batch_size": 0, "best": None, "meter": meter}
    return {"stage": "train", "args": args, "config": config, "range": [-1, 1], **model.state_dict(), **progress}


def save_run(name="tiny", epochs=2, argv=(), **changes):
    """A whole run: states, generator files, two steps an epoch; changes: of conftest.tiny_model."""
    folder = RUNS / name
    folder.mkdir(parents=True)
    args = saved_args(*argv)
    model = tiny_model(**changes)
    channels = model.networks["G_AB"].config.channels
    size = (args["img_height"], args["img_width"])
    metadata = {"stage": "train", "run_name": name, "dataset_name": "tiny", "size": list(size)}
    metadata["data_root"] = args["data_root"]
    saver = CheckpointSaver(folder, metadata, checkpoint_interval=1)
    noise = torch.Generator().manual_seed(1)
    for epoch in range(1, epochs + 1):
        for _ in range(2):
            real_A, real_B = torch.rand(2, 2, channels, *size, generator=noise) * 2 - 1
            model.step(real_A, real_B)
        saver.save(state_of_model(model, args, epoch, 2 * epoch), model.ema_networks, lambda: None)
    return model


def save_pair(name="pair", size=(16, 16), **networks):
    """Generator files alone, each of its own network."""
    folder = RUNS / name
    folder.mkdir(parents=True)
    for generator, net in networks.items():
        direction = str(Direction(generator[2], generator[3]))
        save_generator(
            folder / f"{generator}.safetensors",
            net,
            {"direction": direction, "size": list(size), "dataset_name": "tiny"},
        )


def run_tiny(*argv):
    """Train on the data set named tiny, for real."""
    train.main(["--dataset_name", "tiny", *TINY, *map(str, argv)])


def state_of(name, file="latest.pt"):
    """A state of a run."""
    return load_state(RUNS / name / file)
