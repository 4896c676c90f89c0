"""The examples of docs/extending.md do what the page says."""

import re
from pathlib import Path

import pytest
import torch
from conftest import noise_image

import train

PAGE = Path(train.__file__).parent / "docs" / "extending.md"
EXAMPLES = re.findall(r"^## (.+?)$.*?```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def run_example(title):
    code = dict(EXAMPLES)[title]
    names = {}
    exec(code, names)
    return names


@pytest.mark.parametrize(("title", "code"), EXAMPLES)
def test_an_example_is_short(title, code):
    assert len(code.splitlines()) < 30


def test_a_loss_is_part_of_the_step():
    names = run_example("A loss")
    losses = names["losses"]
    terms = sum(losses[f"tv_{domain}"] * 0.1 for domain in "AB")
    plain = sum(losses[f"gan_{way}"] for way in ("AB", "BA"))
    plain += sum(10 * losses[f"cycle_{domain}"] + 5 * losses[f"identity_{domain}"] for domain in "AB")
    assert losses["loss_G"].item() == pytest.approx((plain + terms).item(), rel=1e-5)


def test_a_generator_trains():
    names = run_example("A generator")
    assert all(torch.isfinite(loss) for loss in names["losses"].values())
    x, hidden = names["networks"]["G_AB"](torch.zeros(1, 3, 20, 12), return_hidden=True)
    assert (x.shape, hidden[0].shape) == ((1, 3, 20, 12), (1, 8, 20, 12))


def test_a_data_set_layout_gives_batches(tmp_path):
    (tmp_path / "photos").mkdir()
    for name in ("cat_0", "cat_1", "cat_2", "dog_0", "dog_1"):
        noise_image(name).save(tmp_path / "photos" / f"{name}.png")
    names = run_example("A data set layout")
    assert names["real_A"].shape == names["real_B"].shape == (2, 3, 32, 32)
    assert names["sampler"].steps == 2


def test_a_weight_layout_loads():
    shapes = {"first": (8, 3, 7, 7), "block.conv1": (8, 8, 3, 3), "block.conv2": (8, 8, 3, 3), "last": (3, 8, 7, 7)}
    theirs = {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    theirs |= {f"{name}.bias": torch.randn(shape[0]) for name, shape in shapes.items()}
    torch.save(theirs, "their_net.pth")
    names = run_example("A weight layout")
    assert torch.equal(names["G"].state_dict()["blocks.0.body.5.weight"], theirs["block.conv2.weight"])
    assert names["metadata"]["direction"] == "AtoB"
