import math

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from metrics import format_table, match_at_1, paired_scores, paired_table, psnr, ssim


def picture(seed, size=(3, 24, 20)):
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_ssim_equals_scikit_image():
    truth = torch.from_numpy(np.linspace(0, 255, 3 * 24 * 20).reshape(3, 24, 20).astype(np.uint8))
    noise = torch.randint(-40, 41, truth.shape, generator=torch.Generator().manual_seed(1))
    answer = (truth.int() + noise).clamp(0, 255).to(torch.uint8)
    reference = structural_similarity(
        answer.numpy(),
        truth.numpy(),
        channel_axis=0,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=255,
    )
    assert ssim(answer, truth) == pytest.approx(reference, abs=1e-9)
    assert ssim(truth, truth) == pytest.approx(1)
    assert math.isnan(ssim(truth[:, :10], truth[:, :10]))


def test_psnr_and_levels_by_hand():
    truth = torch.full((3, 16, 16), 100, dtype=torch.uint8)
    answer = truth.clone()
    answer[:, :8] += 7  # half of the pixels are off by 7 in every channel
    answer[0, 8:, 0] += 11  # eight more by 11 in one channel
    scores = paired_scores([answer], [truth])
    mse = (128 * 49 * 3 + 8 * 121) / 768
    assert scores["PSNR"] == pytest.approx(10 * math.log10(255**2 / mse))
    assert scores["RMSE"] == pytest.approx(math.sqrt(mse))
    assert scores["L1"] == pytest.approx((128 * 7 * 3 + 8 * 11) / 768)
    assert scores["within_5"] == pytest.approx(120 / 256)
    assert scores["within_10"] == pytest.approx(248 / 256)
    assert psnr(truth, truth) == 100


def test_scores_are_means_over_pictures():
    truths = [picture(0), picture(1)]
    answers = [truths[0], picture(2)]
    scores = paired_scores(answers, truths)
    assert scores["PSNR"] == pytest.approx((100 + psnr(answers[1], truths[1])) / 2)


def test_match_at_1_tells_an_answer_from_a_constant():
    truths = [picture(i) for i in range(5)]
    near = [(t.int() + 3).clamp(0, 255).to(torch.uint8) for t in truths]
    assert match_at_1(near, truths) == 1
    assert match_at_1([truths[2]] * 5, truths) == pytest.approx(0.2)
    assert match_at_1(near[::-1], truths) == pytest.approx(0.2)


def test_sizes_may_differ_between_pictures_and_from_the_truth():
    truths = [picture(0, (3, 24, 20)), picture(1, (3, 40, 32))]
    answers = [picture(2, (3, 12, 12)), picture(3, (3, 40, 32))]
    scores = paired_scores(answers, truths)
    assert 0 < scores["PSNR"] < 20
    assert 0 <= scores["match@1"] <= 1


def test_table_puts_the_baselines_beside_the_model():
    truths, inputs = [picture(0), picture(1)], [picture(2), picture(3)]
    mean = torch.stack(truths).double().mean(0)
    table = paired_table(truths, inputs, truths, mean)
    assert list(table) == ["model", "copy", "mean picture"]
    assert table["model"]["PSNR"] == 100
    assert table["copy"]["PSNR"] == pytest.approx(paired_scores(inputs, truths)["PSNR"])
    assert table["mean picture"]["PSNR"] > table["copy"]["PSNR"]
    assert [line.split()[0] for line in format_table(table)] == ["L1", "model", "copy", "mean"]
