from itertools import pairwise

import pytest
import torch

from models import GeneratorConfig, build_generator
from toolkit import tiles
from toolkit.tiles import blend_tiles, receptive_field, tile_spans, tiles_of, translate_tiled


def generator(init="normal", **config):
    return build_generator(GeneratorConfig(**{"ngf": 4, "num_residual": 1, **config}), init).eval()


def test_tiles_cover_an_image_overlap_and_leave_what_does_not_depend_on_them():
    for length, tile, step in ((100, 32, 1), (64, 64, 4), (65, 64, 4), (40, 64, 4), (1000, 96, 4), (17, 16, 4)):
        spans = tile_spans(length, tile, tile // 8, step)
        assert (spans[0].start, spans[-1].stop) == (0, length)
        assert all(a.stop - b.start >= tile // 8 for a, b in pairwise(spans))
        assert all(span.start % step == 0 for span in spans)
        assert all(min(length, 2 * step) <= span.stop - span.start < tile + step for span in spans)
    images = torch.rand(2, 3, 50, 131) * 2 - 1
    assert torch.allclose(blend_tiles(lambda x: x * 2, images, tiles_of(images, 32, 8), 8), images * 2, atol=1e-6)


def test_tiles_are_no_larger_than_they_need_to_be():
    sides = [span.stop - span.start for span in tile_spans(1024, 512, 64, 4)]
    assert max(sides) < 400  # three of 512 would be half as much again


def test_an_image_in_tiles_equals_the_whole_where_no_norm_looks_further_than_the_network():
    net = generator("kaiming", n_downsampling=1, norm="none")
    image = torch.rand(1, 3, 120, 100) * 2 - 1
    with torch.no_grad():
        whole = net(image)
        tiled = blend_tiles(net, image, tiles_of(image, 80, 32, 2), 32)
    assert (whole - tiled).abs().mean() < 0.005 * whole.abs().mean()  # a tile's border is padded by reflection


def lopsided_image():
    """One half nearly flat, the other noise: tiles of very different statistics."""
    image = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    image[..., :48] = 0.01 * image[..., :48] + 0.5
    return image


def test_all_tiles_are_normalised_alike_so_that_a_flat_one_does_not_stand_out():
    net = generator(ngf=8, num_residual=2)
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            torch.nn.init.normal_(module.weight, 0, 0.2)
    image = lopsided_image()
    with torch.no_grad():
        whole = net(image)
        alone = blend_tiles(net, image, tiles_of(image, 48, 6, 4), 6)
        shared = translate_tiled(net, net, image, 48)
    assert (shared - whole).abs().mean() < 0.6 * (alone - whole).abs().mean()
    assert all("forward" not in vars(module) for module in net.modules())


def test_the_norms_are_themselves_again_when_a_tile_fails():
    net = generator()

    def fail(x):
        raise MemoryError

    with pytest.raises(MemoryError):
        translate_tiled(net, fail, lopsided_image(), 48)
    assert all("forward" not in vars(module) for module in net.modules())


def test_one_tile_that_holds_the_image_gives_what_the_whole_gives():
    net = generator()
    with torch.no_grad():
        whole = net(lopsided_image())
        assert torch.allclose(translate_tiled(net, net, lopsided_image(), 96), whole, atol=1e-5)


@pytest.mark.parametrize("halvings", range(5))
@pytest.mark.parametrize("upsample", ["deconv", "resize"])
@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_the_receptive_field_is_where_an_output_pixel_looks(halvings, upsample, blocks):
    config = GeneratorConfig(ngf=1, num_residual=blocks, n_downsampling=halvings, upsample=upsample, norm="none")
    net = build_generator(config).double()
    for weight in net.parameters():  # positive, so that no ReLU hides a path
        torch.nn.init.constant_(weight, 0 if weight.dim() == 1 else 1 / weight[0].numel())
    grid = 2**halvings  # the field varies with the pixel's place in it
    middle = grid * (receptive_field(config) // grid + 1)
    image = torch.rand(1, 3, max(8, 4 * grid), 2 * middle, dtype=torch.float64, requires_grad=True)
    output = net(image)
    sides = []
    for pixel in range(middle, middle + grid):
        (slope,) = torch.autograd.grad(output[0, :, 2 * grid, pixel].sum(), image, retain_graph=True)
        seen = slope.abs().sum((0, 1, 2)).nonzero()
        sides.append(int(seen.max() - seen.min()) + 1)
    assert max(sides) == receptive_field(config)


def test_pieces_come_from_all_over_the_image_and_have_one_size():
    image = torch.arange(100.0).view(1, 1, 1, 100).expand(1, 3, 90, 100)
    batches = tiles.scattered_pieces(image, 16, 4, 4)
    assert len({batch.shape[1:] for batch in batches}) == 1
    assert max(len(batch) for batch in batches) <= 4
    seen = torch.cat([batch.flatten() for batch in batches]).unique()
    assert len(seen) > 90


@pytest.mark.parametrize("affine", [False, True])
def test_statistics_are_those_of_all_pieces(affine):
    norm = torch.nn.InstanceNorm2d(3, affine=affine)
    if affine:
        torch.nn.init.constant_(norm.weight, 2)
        torch.nn.init.constant_(norm.bias, 1)
    statistics = tiles.Statistics([norm])
    pieces = [torch.rand(2, 3, 8, 8) + i for i in range(3)]
    with torch.no_grad():
        for batch in pieces:
            statistics.take(norm, batch)
        x = torch.cat(pieces)
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
        expected = (x - mean) / (var + norm.eps).sqrt()
        expected = 2 * expected + 1 if affine else expected
        assert torch.allclose(statistics.normalise(norm, x), expected, atol=1e-4)


def test_statistics_of_a_group_are_those_of_all_its_channels():
    norm = torch.nn.GroupNorm(2, 6)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    statistics = tiles.Statistics([norm])
    pieces = [torch.rand(2, 6, 8, 8) + i for i in range(3)]
    with torch.no_grad():
        for batch in pieces:
            statistics.take(norm, batch)
        whole = torch.cat(list(torch.cat(pieces)), dim=-1)[None]  # all pieces side by side: one image
        normalised = torch.cat(list(statistics.normalise(norm, torch.cat(pieces))), dim=-1)[None]
        assert torch.allclose(normalised, norm(whole), atol=1e-4)


def test_statistics_of_half_precision_are_those_of_its_numbers():
    """As under bfloat16, where a norm gets maps of it: the statistics themselves are not rounded."""
    norm = torch.nn.InstanceNorm2d(3)
    statistics = tiles.Statistics([norm])
    batch = (torch.rand(4, 3, 16, 16) * 3 + 2).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        statistics.take(norm, batch)
    mean, square = statistics.sums[norm] / 4
    assert mean.dtype == torch.float32
    assert torch.allclose(mean, batch.float().mean((0, 2, 3)), rtol=1e-4)
    assert torch.allclose(square, batch.float().square().mean((0, 2, 3)), rtol=1e-3)


def test_what_follows_the_last_norm_is_not_computed_for_statistics():
    net = generator(n_downsampling=1)
    heads = []
    net.head.register_forward_hook(lambda *_: heads.append(1))
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        translate_tiled(net, net, image, 48)
    assert len(heads) == len(tiles_of(image, 48, 6, 2))


@pytest.mark.parametrize(
    "net", [{}, {"generator": "unet_vit", "vit_blocks": 1}, {"norm": "batch"}, {"norm": "group"}, {"norm": "none"}]
)
@pytest.mark.parametrize("size", [(40, 100), (100, 17), (33, 65)])
def test_any_network_and_size_go_in_tiles(net, size):
    net = generator(**net)
    with torch.no_grad():
        assert translate_tiled(net, net, torch.rand(1, 3, *size), 32).isfinite().all()


def test_a_large_image_shows_how_far_it_is(monkeypatch):
    bars = []

    class Bar(tiles.tqdm):
        def close(self):
            bars.append((self.n, self.total))
            super().close()

    monkeypatch.setattr(tiles, "tqdm", Bar)
    net = generator()
    with torch.no_grad():
        translate_tiled(net, net, torch.rand(1, 3, 96, 96), 48)
    done, total = bars[0]
    assert done == total > 9
