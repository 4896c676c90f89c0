from contextlib import suppress
from itertools import pairwise

import pytest
import torch
from torch import nn

from models import GeneratorConfig, build_generator
from toolkit import tiles
from toolkit.tiles import SharedStatistics, axis_weights, blend_tiles, receptive_field, tile_spans, translate_tiled


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def generator(init="normal", ngf=4, num_residual=1, **config):
    return build_generator(GeneratorConfig(ngf=ngf, num_residual=num_residual, **config), init).eval()


# -- positions and blending ------------------------------------------------------------------


@pytest.mark.parametrize("every", [331, pytest.param(7, marks=pytest.mark.slow)])
@pytest.mark.parametrize("downsamplings", range(5))
def test_tiles_cover_a_side_and_overlap(downsamplings, every):
    step = 2**downsamplings
    for tile in range(max(16, 2 * step), 513):
        overlap = tile // 8
        for length in {16, tile - 1, *range(tile, 4097, every), *range(tile + 1, tile + step + 2), 4096}:
            spans = tile_spans(length, tile, overlap, step)
            sides = [span.stop - span.start for span in spans]
            assert (spans[0].start, spans[-1].stop) == (0, length), (tile, length)
            assert min((a.stop - b.start for a, b in pairwise(spans)), default=overlap) >= overlap, (tile, length)
            assert not any(span.start % step for span in spans), (tile, length)
            assert min(length, 2 * step) <= min(sides), (tile, length)
            assert max(sides) < tile + step, (tile, length)


def test_tiles_are_no_larger_than_needed():
    assert (
        max(span.stop - span.start for span in tile_spans(1024, 512, 64, 4)) < 400
    )  # three of 512 cost half as much again


def test_blending_preserves_what_does_not_depend_on_tiles():
    images = torch.rand(2, 3, 50, 131) * 2 - 1
    assert torch.allclose(blend_tiles(lambda x: x * 2, images, 32, 8), images * 2, atol=1e-6)


def test_tiles_with_gaps_are_not_blended():
    with pytest.raises(AssertionError, match="cover"):
        axis_weights([slice(0, 19), slice(20, 40)], 2)


@pytest.mark.parametrize("downsamplings", range(5))
@pytest.mark.parametrize("upsampling", [{}, {"upsample": "resize"}, {"upsample": "resize", "resize_mode": "bilinear"}])
@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_the_receptive_field_is_what_an_output_pixel_depends_on(downsamplings, upsampling, blocks):
    config = GeneratorConfig(ngf=1, num_residual=blocks, n_downsampling=downsamplings, norm="none", **upsampling)
    net = build_generator(config).double()
    for weight in net.parameters():  # positive, so that no ReLU hides a dependence
        nn.init.constant_(weight, 0 if weight.dim() == 1 else 1 / weight[0].numel())
    grid = 2**downsamplings  # the field depends on the pixel's position in it
    middle = grid * (receptive_field(config) // grid + 1)
    image = torch.rand(1, 3, max(8, 4 * grid), 2 * middle, dtype=torch.float64, requires_grad=True)
    sides = []
    with torch.enable_grad():
        output = net(image)
        for pixel in range(middle, middle + grid):
            (slope,) = torch.autograd.grad(output[0, :, 2 * grid, pixel].sum(), image, retain_graph=True)
            seen = slope.abs().sum((0, 1, 2)).nonzero()
            sides.append(int(seen.max() - seen.min()) + 1)
    assert max(sides) == receptive_field(config)


def test_patches_come_from_all_over_the_image_and_have_one_size():
    positions = torch.stack(torch.meshgrid(torch.arange(90.0), torch.arange(100.0), indexing="ij"))[None]
    batches = tiles.sample_patches(positions, 16, 4, 4)
    assert len({batch.shape[1:] for batch in batches}) == 1
    assert max(len(batch) for batch in batches) <= 4
    rows, columns = torch.cat(batches).transpose(0, 1).flatten(1)
    assert len(rows.unique()) > 80
    assert len(columns.unique()) > 90


# -- shared statistics -----------------------------------------------------------------------


@pytest.mark.parametrize("norm", [nn.InstanceNorm2d(6), nn.InstanceNorm2d(6, affine=True), nn.GroupNorm(2, 6)])
def test_statistics_are_those_of_all_patches(norm):
    for weight in norm.parameters():
        nn.init.normal_(weight)
    statistics = SharedStatistics([norm])
    patches = [torch.rand(2, 6, 8, 8) + i for i in range(3)]
    for batch in patches:
        statistics.add(norm, batch)
    one_image = torch.cat(list(torch.cat(patches)), dim=-1)[None]  # all patches side by side
    normalised = torch.cat(list(statistics.normalise(norm, torch.cat(patches))), dim=-1)[None]
    assert torch.allclose(normalised, norm(one_image), atol=1e-4)


def test_statistics_of_half_precision_are_not_rounded():
    norm = nn.InstanceNorm2d(3)
    statistics = SharedStatistics([norm])
    batch = (torch.rand(4, 3, 16, 16) * 3 + 2).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        statistics.add(norm, batch)
    expected = [batch.float().pow(power).mean((0, 2, 3)) for power in (1, 2)]
    assert torch.allclose(statistics.sums[norm] / 4, torch.stack(expected), rtol=1e-4)


# -- translating -----------------------------------------------------------------------------


def lopsided_image():
    """One half is nearly flat, the other noise: tiles have very different statistics."""
    image = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    image[..., :48] = 0.01 * image[..., :48] + 0.5
    return image


@pytest.mark.parametrize(("downsamplings", "tile", "overlap"), [(0, 60, 24), (1, 80, 32), (2, 100, 48), (3, 150, 72)])
def test_tiles_equal_the_whole_where_there_is_no_norm(downsamplings, tile, overlap):
    net = generator("kaiming", n_downsampling=downsamplings, norm="none")
    image = torch.rand(1, 3, 120, 200) * 2 - 1
    whole = net(image)
    tiled = blend_tiles(net, image, tile, overlap, 2**downsamplings)
    assert (whole - tiled).abs().mean() < 0.005 * whole.abs().mean()  # a tile's border is padded by reflection


@pytest.mark.parametrize(
    ("downsamplings", "blocks", "tile", "size"),
    [(0, 1, 16, (40, 100)), (1, 1, 17, (50, 90)), (2, 3, 19, (24, 1000)), (3, 1, 55, (60, 333)), (4, 0, 94, (94, 592))],
)
def test_small_tiles_equal_the_whole_where_no_pixel_depends_on_its_neighbours(downsamplings, blocks, tile, size):
    net = generator(num_residual=blocks, n_downsampling=downsamplings, upsample="resize", norm="none")
    for kernel in (weight for weight in net.parameters() if weight.dim() == 4):
        middle = kernel.shape[-1] // 2
        nn.init.zeros_(kernel)[:, :, middle, middle] = 1 / kernel.shape[1]
    image = torch.rand(1, 3, *size)
    assert torch.allclose(translate_tiled(net, net, image, tile), net(image), atol=1e-5)


def test_all_tiles_are_normalised_alike_so_that_a_flat_one_does_not_stand_out():
    net = generator(ngf=8, num_residual=2)
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(module.weight, 0, 0.2)
    image = lopsided_image()
    whole = net(image)
    alone = blend_tiles(net, image, 48, 6, 4)
    shared = translate_tiled(net, net, image, 48)
    assert (shared - whole).abs().mean() < 0.6 * (alone - whole).abs().mean()


@pytest.mark.parametrize("fails", [False, True])
def test_the_norms_are_unchanged_afterwards(fails):
    net = generator()

    def translate(x):
        if fails:
            raise MemoryError
        return net(x)

    before = net(lopsided_image())
    with suppress(MemoryError):
        translate_tiled(net, translate, lopsided_image(), 48)
    assert torch.equal(net(lopsided_image()), before)
    assert torch.equal(translate_tiled(net, net, lopsided_image(), 96), before)  # one tile is the whole


@pytest.mark.parametrize(
    "net", [{}, {"generator": "unet_vit", "vit_blocks": 1}, {"norm": "batch"}, {"norm": "group"}, {"norm": "none"}]
)
@pytest.mark.parametrize("size", [(40, 100), (100, 17), (33, 65)])
def test_any_network_and_size_can_be_tiled(net, size):
    net = generator(**net)
    assert translate_tiled(net, net, torch.rand(1, 3, *size), 32).isfinite().all()


def test_a_large_image_shows_its_progress(monkeypatch):
    bars = []

    class Bar(tiles.tqdm):
        def close(self):
            bars.append((self.n, self.total))
            super().close()

    monkeypatch.setattr(tiles, "tqdm", Bar)
    net = generator()
    translate_tiled(net, net, torch.rand(1, 3, 96, 96), 48)
    assert all(done == total for done, total in bars)
    assert sum(total for _, total in bars) > 9
