import os
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import noise_image, tiny_networks
from PIL import Image
from tiny_runs import save_pair, save_run

from models import GeneratorConfig, build_generator
from toolkit import devices, inference, tiles
from toolkit.images import list_images, load_image, range_to_bytes
from toolkit.inference import Source, Translator, translate_folder
from toolkit.weights import load_generator, save_generator
from utils import InputError


def generator(init="normal", **config):
    return build_generator(GeneratorConfig(**{"ngf": 4, "num_residual": 1, **config}), init).eval()


def translator(net=None, size=(16, 16), **options):
    return Translator({"G_AB": net or generator()}, {"size": size}, "cpu", "fp32", **options)


# -- finding networks ------------------------------------------------------------------------


def test_a_run_is_translated_without_a_command_line():
    save_run()
    nets, metadata = inference.load_networks(None, "tiny")
    ours = Translator(nets, metadata, "cpu", "fp32", output_size="net")
    assert ours.directions == ["AtoB", "BtoA"]
    assert (ours.size, ours.channels, metadata["step"]) == ((16, 16), 3, 4)
    noise_image(1).save("a.png")
    (result,) = translate_folder(ours, "BtoA", Path(), [Path("a.png")], Path("out"))
    assert result.files == {kind: Path(kind, "a.png") for kind in ("real_B", "fake_A", "rec_B")}
    with torch.no_grad():
        expected = nets["G_BA"](load_image(Path("a.png"), (16, 16))[None])[0]
    written = np.asarray(Image.open("out/fake_A/a.png"))
    assert np.array_equal(written, range_to_bytes(expected).permute(1, 2, 0).numpy())


def test_networks_with_other_channels_do_not_belong_together():
    colour = tiny_networks()
    grey = tiny_networks(channels=1)
    inference.check_together(colour, "here")
    inference.check_together(grey, "here", (16, 16))
    for name in colour:
        with pytest.raises(InputError, match=rf"^here: .*channels.*{name} 1"):
            inference.check_together({**colour, name: grey[name]}, "here")
    save_pair(G_AB=grey["G_AB"], G_BA=colour["G_BA"])
    with pytest.raises(InputError, match=r"saved_models/pair: .*channels"):
        inference.load_run("pair")


def test_networks_for_larger_images_than_they_are_said_to_get_are_refused():
    deep = {"G_AB": generator(n_downsampling=4), "D_B": tiny_networks(n_layers=4)["D_B"]}
    for name, size in (("G_AB", (16, 40)), ("D_B", (47, 32))):
        with pytest.raises(InputError, match=rf"{size[1]}x{size[0]} px.* {name}"):
            inference.check_together({name: deep[name]}, "here", size)
    inference.check_together(deep, "here", (48, 48))
    save_run(argv=["--img_height", 32, "--img_width", 32], n_downsampling=4)
    folder = Path("saved_models/tiny")
    inference.load_run_state(folder, "latest")


def test_generator_files_of_two_saves_give_way_to_the_state(capsys):
    model = save_run()
    other = Path("saved_models/tiny/G_BA.safetensors")
    save_generator(other, model.nets["G_BA"], {**load_generator(other)[1], "step": 2})
    assert "flags" in inference.load_run("tiny")[1]
    assert "saved_models/tiny" in capsys.readouterr().out


# -- large images ----------------------------------------------------------------------------


def test_a_transformer_looks_everywhere(capsys):
    assert tiles.receptive_field(GeneratorConfig(generator="unet_vit")) == float("inf")
    net = generator(generator="unet_vit", vit_blocks=0)
    translator(net, tile=16)
    assert "--tile 16" in capsys.readouterr().err


def test_tiles_are_as_large_as_all_networks_need(capsys):
    with pytest.raises(InputError, match=r"--tile 31.* 32 px"):
        translator(generator(n_downsampling=4), (32, 32), tile=31)
    nets = {"G_AB": generator(), "G_BA": generator(n_downsampling=3)}
    with pytest.raises(InputError, match=r"--tile 15.* 16 px"):
        Translator(nets, {"size": (16, 16)}, "cpu", "fp32", tile=15)
    translator(generator(n_downsampling=0, num_residual=0), tile=16)
    assert capsys.readouterr().err == ""  # a pixel depends on 13 px


# -- names -----------------------------------------------------------------------------------


def names_of(paths):
    plan = inference.plan_results("AtoB", Path("in"), [Path("in", path) for path in paths], round_trip=False)
    return [str(result.name) for result in plan.values()]


def test_names_are_those_of_the_inputs_unless_they_collide():
    assert names_of(["a.jpg", "sub/a.jpg", "b.JPG"]) == ["a.png", "sub/a.png", "b.png"]
    assert names_of(["a.jpg", "a.png", "a.jpg.bmp"]) == ["a.jpg.png", "a.png.png", "a.jpg_.png"]
    assert names_of(["a.jpg", "A.jpg", "sub/A.jpg"]) == ["a.png", "A_.png", "sub/A.png"]


def test_names_that_would_be_too_long_are_shortened_and_stay_apart():
    long = "x" * 250
    names = names_of([f"{long}.jpg", f"{long}.png", f"{long}.bmp", f"sub/{long}.jpg", f"{'猫' * 83}.tif"])
    assert names[3:] == [f"sub/{long}.png", f"{'猫' * 83}.png"]  # 254 and 253 bytes
    many = names_of([f"{'ü' * 125}{suffix}" for suffix in (".jpg", ".jpe", ".JPG", ".png", ".PNG")])
    for name in (*names, *many):
        assert len(os.fsencode(Path(name).name)) <= 255
        assert name.endswith(".png")
    assert len({name.lower() for name in (*names, *many)}) == len(names) + len(many)
    assert all(name.startswith("x" * 230) for name in names[:3])


def test_two_inputs_of_one_long_stem_are_both_translated():
    Path("in").mkdir()
    for suffix in (".png", ".bmp"):
        noise_image(suffix).save(f"in/{'x' * 250}{suffix}")
    results = translate_folder(translator(), "AtoB", Path("in"), list_images(Path("in")), Path("out"))
    assert len(results) == 2
    assert all(Path("out", result.files["fake_B"]).is_file() for result in results)


# -- memory ----------------------------------------------------------------------------------


class LazyPool:
    """Counts what was handed in and not yet taken."""

    def __init__(self):
        self.held = 0
        self.most = 0

    def submit(self, function, item):
        self.held += 1
        self.most = max(self.most, self.held)
        future = Future()
        future.set_result(function(item))
        return future


@pytest.mark.parametrize(
    ("pixels", "most"), [(100, 2 * inference.BATCH + 1), (12_000_000, 5), (0, inference.THREADS + 1)]
)
def test_few_large_images_wait_at_a_time(pixels, most):
    pool = LazyPool()
    for count, source in enumerate(inference.ahead(pool, lambda i: Source(Path(str(i)), pixels=pixels), range(100))):
        pool.held -= 1
        assert source.path == Path(str(count))
        if pixels == 12_000_000:
            assert pool.held <= 4 - count or pool.held <= 1
    assert pool.most == most


def test_batches_hold_alike_images_in_order_and_none_too_many_pixels(monkeypatch):
    monkeypatch.setattr(inference, "BATCH", 3)
    monkeypatch.setattr(inference, "BATCH_PIXELS", 800)

    def source(side):
        image = Image.new("RGB", (side, side)) if side else None
        return Source(Path("x"), image, image, fault=None if image else "torn")

    sides = [10, 10, 10, 10, 20, 20, 20, 0, 0, 30, 30, 10]
    batches = inference.in_batches(map(source, sides))
    found = [[item.seen.size[0] if item.seen else 0 for item in batch] for batch in batches]
    assert found == [[10, 10, 10], [10], [20, 20], [20], [0], [0], [30], [30], [10]]


def test_photos_that_are_reduced_for_the_network_do_not_wait_for_a_batch():
    image = Image.new("RGB", (10, 10))
    sources = [Source(Path("x"), image, image, pixels=pixels) for pixels in (100, 100, 12_000_000, 12_000_000)]
    assert [len(batch) for batch in inference.in_batches(iter(sources))] == [2, 1, 1]


def test_photos_that_would_fill_the_memory_of_a_transformer_are_left_out(monkeypatch):
    monkeypatch.setattr(devices, "total_memory", lambda device: 4e6)
    net = generator(generator="unet_vit", vit_blocks=0)
    noise_image(1, (160, 160)).save("large.png")
    assert "tokens" in str(translator(net, scale="native").read_seen(Path("large.png")).fault)
    assert translator(net).read_seen(Path("large.png")).fault is None
