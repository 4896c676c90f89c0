"""Our forms of torch's layers compute what torch's do."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import NORMS, VIT_SIZES, GeneratorConfig, VitSize, build_generator
from toolkit.layers import Conv3x3, InstanceNorm2d, ThinConv2d, mirror


@pytest.mark.parametrize("shape", [(2, 5, 9, 12), (1, 5, 2, 1), (2, 5, 40, 7)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("affine", [False, True])
def test_instance_norm_equals_that_of_torch(shape, layout, affine):
    x = torch.randn(shape, dtype=torch.float64).to(memory_format=layout)
    ours = InstanceNorm2d(5, affine=affine).double()
    for p in ours.parameters():
        nn.init.normal_(p)
    theirs = nn.InstanceNorm2d(5, affine=affine).double()
    theirs.load_state_dict(ours.state_dict())
    assert torch.allclose(ours(x), theirs(x), atol=1e-12)


GENERATORS = [{"num_residual": 2, "ngf": 4, "norm": norm} for norm in NORMS]
GENERATORS += [{"num_residual": 1, "ngf": 32, "norm": "group", "skips": True, "upsample": "resize"}]
GENERATORS += [{"generator": "unet_vit", "vit_blocks": 1}]


def gradients(net, x, weights, layout):
    """Of each weight, in float64, with all tensors in a memory format."""
    net = copy.deepcopy(net).to(memory_format=layout)
    output = net(x.to(memory_format=layout))
    (output * weights).sum().backward()
    return {name: p.grad.double() for name, p in net.named_parameters()}


@pytest.mark.parametrize("config", GENERATORS, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_every_gradient_is_that_of_float64_in_both_memory_formats(monkeypatch, config, layout):
    """torch's instance_norm fails this in channels_last with one image (findings/)."""
    monkeypatch.setitem(VIT_SIZES, "small", VitSize((4, 8, 16), ffn=32, blocks=4, heads=4, uvcgan_layers=False))
    net = build_generator(GeneratorConfig(**config))
    for batch in (1, 2, 3):
        x, weights = (torch.randn(batch, 3, 16, 20, dtype=torch.float64) for _ in range(2))
        exact = gradients(net.double(), x, weights, torch.contiguous_format)
        found = gradients(net.float(), x.float(), weights.float(), layout)
        for name, gradient in exact.items():
            if gradient.norm() > 1e-6 * max(g.norm() for g in exact.values()):  # else 0 but for rounding
                assert F.cosine_similarity(found[name].flatten(), gradient.flatten(), dim=0) > 0.999, (batch, name)


@pytest.mark.parametrize("shape", [(2, 16, 16), (3, 17, 14), (1, 30, 32)], ids=str)
def test_winograd_convolution_equals_that_of_float64_forward_and_backward(shape):
    images, height, width = shape
    conv = Conv3x3(33, 40).to(memory_format=torch.channels_last)
    x = torch.randn(images, 33, height + 2, width + 2).to(memory_format=torch.channels_last).requires_grad_()
    weights = torch.randn(images, 40, height, width)
    exact = [x.detach().double().requires_grad_(), *(p.detach().double().requires_grad_() for p in conv.parameters())]
    assert conv.winograd_pays(x)
    outputs = [conv(x), F.conv2d(*exact)]
    assert outputs[0].is_contiguous(memory_format=torch.channels_last)
    gradients = [
        torch.autograd.grad((y * weights).sum(), leaves)
        for y, leaves in zip(outputs, ([x, *conv.parameters()], exact), strict=True)
    ]
    for found, wanted in zip([outputs[0], *gradients[0]], [outputs[1], *gradients[1]], strict=True):
        assert (found - wanted).abs().max() < 2e-5 * wanted.abs().max()


def test_winograd_is_not_used_where_torch_is_faster_or_another_precision_is_asked_for():
    conv = Conv3x3(32, 32).to(memory_format=torch.channels_last)
    x = torch.randn(2, 32, 18, 18).to(memory_format=torch.channels_last)
    assert conv.winograd_pays(x)
    assert not conv.winograd_pays(x[:1].contiguous(memory_format=torch.channels_last))  # 16 tiles
    assert not conv.winograd_pays(x.contiguous())
    assert not conv.winograd_pays(x.double())
    assert not Conv3x3(32, 32).winograd_pays(x)
    assert not Conv3x3(16, 32).to(memory_format=torch.channels_last).winograd_pays(x[:, :16])
    with torch.autocast("cpu", torch.bfloat16):
        assert not conv.winograd_pays(x)


@pytest.mark.parametrize("out_channels", [1, 3])
def test_thin_convolution_equals_a_plain_one(out_channels):
    thin = ThinConv2d(6, out_channels, 7).double()
    nn.init.normal_(thin.bias)
    plain = nn.Conv2d(6, out_channels, 7).double()
    plain.load_state_dict(thin.state_dict())
    x = torch.randn(2, 6, 13, 10, dtype=torch.float64)
    assert thin(x).shape == (2, out_channels, 7, 4)
    assert torch.allclose(thin(x), plain(x), atol=1e-12)
    half = x.bfloat16()  # as from the layer before it; the partial sums are not rounded to bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        output = thin.float()(half)
    assert output.dtype == torch.float32
    assert torch.allclose(output, plain.float()(half.float()), atol=1e-5)


@pytest.mark.parametrize("pad", [(3, 3, 3, 3), (0, 1, 0, 3), (2, 0, 1, 0), (0, 0, 0, 0)])
def test_padding_by_slices_equals_that_of_torch_and_so_does_its_gradient(pad):
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    expected = F.pad(x, pad, mode="reflect")
    padded = mirror(x, pad)
    assert torch.equal(padded, expected)
    weight = torch.randn_like(expected)
    (gradient,) = torch.autograd.grad((padded * weight).sum(), x)
    (expected_gradient,) = torch.autograd.grad((expected * weight).sum(), x)
    assert torch.allclose(gradient, expected_gradient, atol=1e-12)
