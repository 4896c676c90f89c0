"""The demo set never changes, so that figures compare."""

import hashlib

import pytest

from toolkit import synthetic


@pytest.mark.parametrize(
    ("seed", "time", "digest"),
    [
        (0, "day", "e8312da6f231"),
        (100_000, "night", "6de63227faad"),
        (200_007, "day", "8b11213cbf49"),
        (200_007, "night", "081b3211059f"),
    ],
)
def test_demo_scenes_are_fixed(seed, time, digest):
    assert hashlib.sha256(synthetic.draw_scene(seed, time, 64).tobytes()).hexdigest()[:12] == digest


def test_the_demo_set_has_unpaired_training_scenes_and_paired_test_scenes():
    seeds = {name: set(range(first, first + count)) for name, (_, first, count) in synthetic.DEMO_FOLDERS.items()}
    assert [len(seeds[name]) for name in ("trainA", "trainB", "testA", "testB")] == [400, 400, 40, 40]
    assert seeds["testA"] == seeds["testB"]
    assert not seeds["trainA"] & seeds["trainB"]
    assert not seeds["testA"] & (seeds["trainA"] | seeds["trainB"])
