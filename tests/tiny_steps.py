"""Batches of noise, and what tiny models learn from them."""

import torch
from conftest import tiny_model

NAMES = ("G_AB", "G_BA", "D_A", "D_B")


def batch(seed, size=8, dtype=torch.float32, channels=3):
    """real_A and real_B of 16 px."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, size, channels, 16, 16, dtype=dtype, generator=generator) * 2 - 1


def double_model(**changes):
    """A tiny model in float64, for tests of equality."""
    return tiny_model(dtype=torch.float64, **changes)


def weights_of(model):
    return {name: {k: v.clone() for k, v in net.state_dict().items()} for name, net in model.networks.items()}


def five_steps(model, size=8):
    """The weights of a float64 model after five steps, and the losses of the last."""
    for step in range(5):
        losses = model.step(*batch(step, size, torch.float64))
    return {**weights_of(model), "losses": losses}


def assert_close(results, others):
    """Two results of five_steps are equal except for the order in which float64 numbers are added."""
    assert results.keys() == others.keys()
    for name, values in results.items():
        assert values.keys() == others[name].keys()
        for key, value in values.items():
            assert (value - others[name][key]).abs().max() < 1e-9, f"{name} {key}"
