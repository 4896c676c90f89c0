import re
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import differences, noise_image, tiny_networks
from PIL import Image
from tiny_runs import save_pair, save_run

from models import DIRECTIONS, GeneratorConfig, build_generator
from toolkit import gallery, inference, tiles
from toolkit.images import ImageReader, bytes_to_range, image_to_pixels, list_images, load_image, range_to_bytes
from toolkit.inference import Inputs, LoadedImage, Translator, plan_results, translate_folder
from toolkit.weights import load_generator, save_generator
from utils import InputError

A_TO_B, B_TO_A = DIRECTIONS


def generator(**config):
    return build_generator(GeneratorConfig(**{"ngf": 4, "num_residual": 1, **config})).eval()


def translator(net=None, size=(16, 16), **options):
    return Translator({"G_AB": net or generator()}, {"size": size}, "cpu", "fp32", **options)


def translate(ours, direction, inputs, output):
    """Translate images as test.py does, with the round trip where there is a way back."""
    results = plan_results(direction, inputs, bool(ours.generators(direction)[1]), {})
    with gallery.open_results(output, ours.settings()) as folder:
        folder.claim([results], False, False)
        return translate_folder(ours, direction, inputs, results, folder)


# -- finding networks ------------------------------------------------------------------------


def test_a_run_is_translated_without_a_command_line():
    save_run()
    networks, metadata = inference.load_networks(None, "tiny")
    ours = Translator(networks, metadata, "cpu", "fp32", output_size="net")
    assert ours.directions == [A_TO_B, B_TO_A]
    assert (ours.size, ours.channels, metadata["step"]) == ((16, 16), 3, 4)
    noise_image(1).save("a.png")
    (result,) = translate(ours, B_TO_A, Inputs(Path(), [Path("a.png")]), Path("out"))
    assert result.files == {folder: Path(folder, "a.png") for folder in ("real_B", "fake_A", "rec_B")}
    with torch.no_grad():
        expected = networks["G_BA"](load_image(Path("a.png"), (16, 16))[None])[0]
    written = np.asarray(Image.open("out/fake_A/a.png"))
    assert np.array_equal(written, range_to_bytes(expected).permute(1, 2, 0).numpy())


@pytest.mark.parametrize("name", ["G_AB", "G_BA", "D_A", "D_B"])
def test_networks_with_other_channels_do_not_belong_together(name):
    networks = tiny_networks()
    inference.check_together(networks, "here")
    networks[name] = tiny_networks(channels=1)[name]
    with pytest.raises(InputError, match=rf"^here: .*channels.*{name} 1"):
        inference.check_together(networks, "here")


def test_a_pair_of_files_with_other_channels_is_refused():
    save_pair(G_AB=tiny_networks(channels=1)["G_AB"], G_BA=tiny_networks()["G_BA"])
    with pytest.raises(InputError, match=r"saved_models/pair: .*channels"):
        inference.load_run("pair")


def test_generator_files_of_two_saves_give_way_to_the_state(capsys):
    model = save_run()
    other = Path("saved_models/tiny/G_BA.safetensors")
    save_generator(other, model.networks["G_BA"], {**load_generator(other)[1], "step": 2})
    assert "loss_config" in inference.load_run("tiny")[1]
    assert "saved_models/tiny: its generator files are of different saves" in capsys.readouterr().out


def test_generator_files_of_two_saves_without_a_state_are_used_with_a_warning(capsys):
    model = save_run()
    other = Path("saved_models/tiny/G_BA.safetensors")
    save_generator(other, model.networks["G_BA"], {**load_generator(other)[1], "step": 2})
    Path("saved_models/tiny/latest.pt").unlink()
    assert inference.load_run("tiny")[0].keys() == {"G_AB", "G_BA"}
    assert "warning: saved_models/tiny: its generator files are of different saves" in capsys.readouterr().err


def test_generator_files_of_two_saves_of_one_step_give_way_to_the_state(capsys):
    model = save_run()
    torch.nn.init.zeros_(model.networks["G_BA"].head[1].weight)
    other = Path("saved_models/tiny/G_BA.safetensors")
    save_generator(other, model.networks["G_BA"], {**load_generator(other)[1], "pair": "of another branch"})
    assert "loss_config" in inference.load_run("tiny")[1]
    assert "generator files are of different saves" in capsys.readouterr().out


def test_generator_files_of_an_older_version_or_an_edited_one_give_way_to_the_state():
    save_run()
    for value in (None, [1], {"a": 1}):
        for name in ("G_AB", "G_BA"):
            path = Path(f"saved_models/tiny/{name}.safetensors")
            net, metadata = load_generator(path)
            save_generator(path, net, {**metadata, "pair": value})
        assert ("loss_config" in inference.load_run("tiny")[1]) == (value is None)


def test_only_files_of_a_run_are_its_generators_and_their_names_are_true():
    save_run()
    folder = Path("saved_models/tiny")
    backup = generator()
    save_generator(folder / "G_v1.safetensors", backup, {**load_generator(folder / "G_AB.safetensors")[1], "step": 1})
    networks, metadata = inference.load_run("tiny")
    assert metadata["step"] == 4
    assert differences(networks["G_AB"].state_dict(), backup.state_dict())
    (folder / "G_AB.safetensors").replace(folder / "G_BA.safetensors")
    with pytest.raises(InputError, match=r"G_BA\.safetensors: its metadata says AtoB, its name BtoA; rename it"):
        inference.load_run("tiny")


def test_a_state_has_the_loss_weights_that_it_was_trained_with():
    save_run(argv=["--lambda_cycle", 3, "--data_root", "elsewhere"])
    _, metadata = inference.load_run("tiny", "1")
    assert metadata["loss_config"].lambda_cycle == 3
    assert metadata["loss_config"].lambda_identity == 5
    assert (metadata["data_root"], metadata["epoch"], metadata["step"]) == ("elsewhere", 1, 2)


# -- large images ----------------------------------------------------------------------------


def test_tiles_are_as_large_as_all_networks_need(capsys):
    with pytest.raises(InputError, match=r"--tile 31.* 32 px"):
        translator(generator(n_downsampling=4), (32, 32), tile=31)
    networks = {"G_AB": generator(), "G_BA": generator(n_downsampling=3)}
    with pytest.raises(InputError, match=r"--tile 15.* 16 px"):
        Translator(networks, {"size": (16, 16)}, "cpu", "fp32", tile=15)
    translator(generator(n_downsampling=0, num_residual=0), tile=16)
    assert capsys.readouterr().err == ""  # a pixel depends on 13 px
    translator(generator(generator="unet_vit", vit_blocks=0), tile=16)
    assert "warning: --tile 16: a pixel depends on the whole image" in capsys.readouterr().err


def test_only_an_image_that_would_take_much_memory_is_cut_into_tiles(monkeypatch, capsys):
    ours = translator(scale="native")
    per_pixel = ours.bytes_per_pixel
    side = 100
    monkeypatch.setattr(inference, "WHOLE_BYTES", per_pixel * side**2)
    monkeypatch.setattr(inference, "TILE", 32)
    sides = []
    ours.networks["G_AB"].register_forward_hook(lambda net, inputs, output: sides.append(max(output.shape[-2:])))
    for name, size in (("whole", (side, side)), ("large", (side + 1, side)), ("larger", (side + 4, side))):
        noise_image(name, size).save(f"{name}.png")
        loaded = ours.load(Path(f"{name}.png"), "A")
        sides.clear()
        output = ours(ours.networks["G_AB"], image_to_pixels(loaded.network_input)[None])
        assert output.shape[-2:] == size[::-1]
        assert max(sides) == side if name == "whole" else max(sides) < 32 + 4  # of the downsampling
    told = r"large\.png: would take about 0\.0 GB; in tiles of 32 px about 0\.0 GB and \S+ s for each network\n"
    assert len(re.findall(told, capsys.readouterr().out)) == 1


def test_an_image_that_is_too_large_even_for_tiles_is_left_out_unless_tiles_are_asked_for(monkeypatch):
    monkeypatch.setattr(inference, "WHOLE_BYTES", 0)
    monkeypatch.setattr(inference, "TILED_BYTES", 0)
    noise_image(1, (60, 70)).save("a.png")
    reason = translator(scale="native").load(Path("a.png"), "A").reason
    assert reason == "60x70 px: needs about 0.0 GB even in tiles; test.py --tile 512 translates it all the same"
    assert translator(scale="native", tile=32).load(Path("a.png"), "A").reason is None


def test_what_a_user_may_not_expect_is_said_once(capsys):
    for i in range(2):
        noise_image(i, (50, 20)).save(f"{i}.png")
    for size, scale in ((None, "train"), ((16, 16), "train"), ((16, 16), "native"), ((30, 30), "train")):
        ours = translator(size=size, scale=scale)
        for i in range(2):
            ours.load(Path(f"{i}.png"), "A")
    assert capsys.readouterr().out.splitlines() == [
        "these weights do not say their training size: 256x256 px is assumed; --scale native keeps that of images",
        "0.png: translated at 16x16 px, then enlarged to 50x20 px; training at a larger size gives more detail",
        "0.png: translated at 3 times the size of the training images: "
        "textures such as stripes become that much finer; compare both sizes",
    ]


@pytest.mark.parametrize("config", [{}, {"norm": "batch", "skips": True, "upsample": "resize"}, {"n_downsampling": 0}])
def test_memory_is_that_of_the_largest_layer_twice(config):
    layers = []
    net = generator(**config)
    for layer in net.modules():
        if not list(layer.children()):
            layer.register_forward_hook(lambda _, inputs, output: layers.append(inputs[0].nbytes + output.nbytes))
    side = 64
    net(torch.zeros(1, 3, side, side))
    assert tiles.bytes_per_pixel(net) * side**2 == 2 * max(layers)


# -- folders ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a.jpg", "sub/a.jpg", "b.JPG"], ["a.png", "sub/a.png", "b.png"]),
        (["a.jpg", "a.png", "a.jpg.bmp"], ["a.jpg.png", "a.png.png", "a.jpg_.png"]),
        (["a.jpg", "A.jpg", "sub/A.jpg"], ["a.png", "A_.png", "sub/A.png"]),
        (["a.jpg", "a.PNG/b.jpg"], ["a_.png", "a.PNG/b.png"]),
        (["a.gif", "a.jpg/b.jpg"], ["a_.png", "a.jpg/b.png"]),  # thumbnails are JPEG files
    ],
)
def test_names_are_those_of_the_inputs_unless_they_collide(paths, names):
    plan = plan_results(A_TO_B, Inputs(Path("in"), [Path("in", path) for path in paths]), False, {})
    assert [str(result.name) for result in plan] == names


def test_an_interrupted_translation_is_in_the_record(monkeypatch):
    Path("in").mkdir()
    for i in range(3):
        noise_image(i).save(f"in/{i}.png")
    plain = Translator.load

    def load(self, path, domain):
        if path.name == "2.png":
            raise KeyboardInterrupt
        return plain(self, path, domain)

    monkeypatch.setattr(Translator, "load", load)
    monkeypatch.setattr(inference, "BATCH", 1)
    monkeypatch.setattr(inference, "THREADS", 1)
    with pytest.raises(KeyboardInterrupt):
        translate(translator(), A_TO_B, Inputs(Path("in"), list_images(Path("in"))), Path("out"))
    written = {str(path.relative_to("out")) for path in Path("out").rglob("*.png")}
    assert written == set(gallery.read_record(Path("out"))[0]) == {"real_A/0.png", "fake_B/0.png"}


class LazyPool:
    """Counts what was submitted and not yet taken."""

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
    photo = SimpleNamespace(width=pixels, height=1) if pixels else None
    for count, image in enumerate(inference.run_ahead(pool, lambda i: LoadedImage(Path(str(i)), photo), range(100))):
        pool.held -= 1
        assert image.path == Path(str(count))
        if pixels == 12_000_000:
            assert pool.held <= max(1, 4 - count)
    assert pool.most == most


def loaded(side, pixels=100):
    """An image that is resized to a side for the network; side 0: one that cannot be read."""
    if side == 0:
        return LoadedImage(Path("x"), reason="torn")
    return LoadedImage(Path("x"), SimpleNamespace(width=pixels, height=1), Image.new("RGB", (side, side)))


def test_batches_have_images_of_one_size_in_order_and_not_too_many_pixels(monkeypatch):
    monkeypatch.setattr(inference, "BATCH", 3)
    monkeypatch.setattr(inference, "BATCH_PIXELS", 800)
    batches = inference.in_batches(map(loaded, [10, 10, 10, 10, 20, 20, 20, 0, 0, 30, 30, 10]))
    found = [[image.network_input.size[0] if image.network_input else 0 for image in batch] for batch in batches]
    assert found == [[10, 10, 10], [10], [20, 20], [20], [0], [0], [30], [30], [10]]


def test_large_photos_do_not_wait_for_a_batch_even_if_the_network_gets_them_small():
    images = [loaded(10, pixels) for pixels in (100, 100, 12_000_000, 12_000_000)]
    assert [len(batch) for batch in inference.in_batches(images)] == [2, 1, 1]


@pytest.mark.parametrize(("size", "suffix"), [((243, 203), "jpg"), ((60, 50), "jpg"), ((60, 50), "png")])
def test_tests_and_evaluations_give_networks_the_same_pixels_which_are_those_of_pillow(size, suffix):
    path = Path(f"x.{suffix}")
    noise_image(0, (24, 20)).resize(size).save(path)
    ours = translator()
    loaded = ours.load(path, "A")
    assert loaded.image.size == size
    with Image.open(path) as image:
        expected = image_to_pixels(image.resize(ours.size[::-1], Image.Resampling.BICUBIC))
    assert torch.equal(image_to_pixels(loaded.network_input), expected)
    assert torch.equal(ImageReader(ours.size)(path), bytes_to_range(expected))
