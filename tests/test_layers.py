"""Our forms of torch's layers compute what torch's do."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from toolkit.layers import InstanceNorm2d, ThinConv2d, mirror


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
