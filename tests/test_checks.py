"""What prepare.py check names, draws and moves."""

from pathlib import Path

import numpy as np
import pytest
from conftest import noise_image
from PIL import Image

import prepare
from toolkit import checks, images


def copy(source, *targets):
    for target in targets:
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(source.read_bytes())


def contents(folder):
    """All files of a data set by their paths in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_grey_small_and_elongated_images_are_named(tiny, capsys):
    noise_image("g", mode="L").save(tiny / "trainA" / "grey.png")
    noise_image("g").convert("L").convert("RGB").save(tiny / "trainB" / "grey.jpg")
    noise_image("s", (12, 8)).save(tiny / "trainA" / "small.png")
    noise_image("l", (90, 22)).save(tiny / "testB" / "long.png")
    prepare.main(["check", "tiny"])
    lines = capsys.readouterr().out.splitlines()
    assert "  1 grey among coloured ones: trainA/grey.png" in lines
    assert "  1 grey among coloured ones: trainB/grey.jpg" in lines
    assert "  1 very small (a side under 9 px): trainA/small.png" in lines
    assert "  1 very elongated (over 3:1): testB/long.png" in lines
    odd = [line for line in lines if line.startswith("  ") and "a square training size" not in line]
    assert len(odd) == 4


def test_the_first_few_are_named_and_the_others_counted(tiny, capsys):
    for i in range(checks.NAMED + 3):
        noise_image(i, (90, 22)).save(tiny / "testA" / f"long{i}.png")
        copy(tiny / "trainA/0.png", tiny / f"trainB/twin{i}.png")
        copy(tiny / "trainB/0.png", tiny / f"trainB/other{i}.png")
        noise_image(f"t{i}").save(tiny / f"trainA/first{i}.png")
        copy(tiny / f"trainA/first{i}.png", tiny / f"trainA/second{i}.png")
    prepare.main(["check", "tiny"])
    out = capsys.readouterr().out
    assert "testA/long5.png, ...\n" in out
    assert "testA/long6.png" not in out
    assert out.count("  the same image: ") == checks.NAMED
    assert f"images that occur more than once: {checks.NAMED + 3 + 2};" in out


def test_a_grey_data_set_and_images_that_are_large_enough_to_train_on_are_not_odd(tiny, capsys):
    for path in images.list_images(tiny):
        Image.open(path).convert("L").save(path)
    (tiny / "valA").mkdir()
    for i, size in enumerate([(900, 800), (900, 800), (900, 800), (300, 260)]):
        noise_image(i, size).save(tiny / "valA" / f"{i}.png")
    prepare.main(["check", "tiny"])
    out = capsys.readouterr().out
    assert "grey" not in out
    assert "very small" not in out
    assert "images that occur more than once: 0;" in out


def test_the_sheet_shows_A_beside_B_in_cells_of_128_px(tiny):
    for split, colour in (("trainA", "red"), ("trainB", "blue")):
        for i in range(6):
            Image.new("RGB", (600, 200), colour).save(tiny / split / f"large{i}.png")
    prepare.main(["check", "tiny", "--sheet"])
    sheet = np.asarray(images.read_image(Path("generated_images/tiny/check.png")))
    assert sheet.shape[0] == 2 + 4 * (128 + 2)  # three rows of training images, one of test images
    red = np.flatnonzero((sheet == (255, 0, 0)).all(2).sum(0) > 20)  # columns with images of A
    blue = np.flatnonzero((sheet == (0, 0, 255)).all(2).sum(0) > 20)
    assert red.max() < sheet.shape[1] // 2 < blue.min()
    assert max(len(run) for run in np.split(red, np.flatnonzero(np.diff(red) > 1) + 1)) == 128


def test_images_with_the_same_pixels_are_duplicates_whatever_the_file(tiny, capsys):
    Image.open(tiny / "trainA/1.png").save(tiny / "trainA/other.bmp")
    before = contents(tiny)
    prepare.main(["check", "tiny", "--sheet"])
    assert "  the same image: trainA/1.png = trainA/other.bmp\n" in capsys.readouterr().out
    assert contents(tiny) == before  # nothing is moved unless that was wanted


def test_duplicates_are_moved_those_in_train_before_those_in_test_and_none_is_lost(tiny, capsys):
    copy(tiny / "trainA/0.png", tiny / "trainA/again.png", tiny / "testA/copy.png", tiny / "valA/copy.png")
    noise_image("val").save(tiny / "valA" / "0.png")
    copy(tiny / "testB/0.png", tiny / "testB/twin.png")
    before = contents(tiny)
    prepare.main(["check", "tiny", "--remove_twins"])
    moved = ("trainA/0.png", "trainA/again.png", "valA/copy.png", "testB/twin.png")
    expected = {f"removed/{name}" if name in moved else name: data for name, data in before.items()}
    assert contents(tiny) == expected
    out = capsys.readouterr().out
    assert "moved 4 images to datasets/tiny/removed\n" in out
    assert "both domains" not in out
    prepare.main(["check", "tiny", "--remove_twins"])
    assert "moved 0 images" in capsys.readouterr().out
    assert contents(tiny) == expected


def test_held_out_images_whose_partner_was_moved_are_named(tiny, capsys):
    copy(tiny / "trainA/0.png", tiny / "trainA/1.png")  # training needs no pairs
    copy(tiny / "testA/0.png", tiny / "testA/1.png", tiny / "valA/2.png")
    noise_image("valA").save(tiny / "valA/3.png")
    copy(tiny / "trainB/1.png", tiny / "valB/2.png", tiny / "valB/3.png")
    copy(tiny / "testB/0.png", tiny / "testB/5.png")  # without a partner from the start
    prepare.main(["check", "tiny", "--remove_twins"])
    out = capsys.readouterr().out
    assert contents(tiny).keys() >= {"testB/1.png", "removed/testA/1.png", "removed/valA/2.png", "removed/valB/3.png"}
    message = "  3 images whose partner was moved: valA/3.png, valB/2.png, testB/1.png; "
    assert f"{message}of a paired set, move these too\n" in out
    prepare.main(["check", "tiny", "--remove_twins"])
    assert "partner" not in capsys.readouterr().out


def test_a_name_that_is_taken_in_removed_is_not_replaced(tiny):
    copy(tiny / "trainA/0.png", tiny / "trainA/twin.png")
    (tiny / "removed/trainA").mkdir(parents=True)
    for name in ("twin.png", "twin_2.png"):
        (tiny / "removed/trainA" / name).write_bytes(name.encode())
    prepare.main(["check", "tiny", "--remove_twins"])
    kept = {path.name: path.read_bytes() for path in (tiny / "removed/trainA").iterdir()}
    twin = (tiny / "trainA/0.png").read_bytes()
    assert kept == {"twin.png": b"twin.png", "twin_2.png": b"twin_2.png", "twin_3.png": twin}


def test_an_image_of_both_domains_is_named_and_not_moved(tiny, capsys):
    copy(tiny / "trainA/0.png", tiny / "trainB/horse.png")
    before = contents(tiny)
    prepare.main(["check", "tiny", "--remove_twins"])
    assert contents(tiny) == before
    out = capsys.readouterr().out
    assert "trainA/0.png = trainB/horse.png" in out
    assert "  in both domains, and not moved: 1 image; remove the wrong copies by hand\n" in out


def test_a_data_set_with_links_is_refused_and_nothing_is_moved(tiny, refused):
    copy(tiny / "testB/0.png", tiny / "trainB/twin.png")
    (tiny / "testA/link.png").symlink_to("../trainA/0.png")
    before = contents(tiny)
    assert "does not move links such as testA/link.png" in refused(prepare.main, "check", "tiny", "--remove_twins")
    (tiny / "testA/link.png").unlink()
    (tiny / "trainA").rename("elsewhere")
    (tiny / "trainA").symlink_to(Path("elsewhere").absolute())
    assert "does not move links such as trainA/0.png" in refused(prepare.main, "check", "tiny", "--remove_twins")
    (tiny / "trainA").unlink()
    Path("elsewhere").rename(tiny / "trainA")
    del before["testA/link.png"]
    assert contents(tiny) == before


def test_no_split_is_emptied(tiny, refused):
    for path in images.list_images(tiny / "trainB"):
        copy(path, tiny / "testB" / f"copy_{path.name}")
    before = contents(tiny)
    error = refused(prepare.main, "check", "tiny", "--remove_twins")
    assert "all 4 images of trainB occur elsewhere; split them anew" in error
    assert contents(tiny) == before


@pytest.mark.parametrize(
    ("sizes", "advice"),
    [
        ([(20, 20), (20, 20)], None),
        (
            [(40, 30), (80, 60)],
            "stretches them 1.33 times (median), at most 1.33 times; --preprocess scale_shortside_and_crop keeps their "
            "shapes, and so does --img_height 192 --img_width 256",
        ),
        (
            [(20, 40), (40, 20), (30, 20)],
            "stretches them 2.00 times (median), at most 2.00 times; --preprocess scale_shortside_and_crop keeps their "
            "shapes",
        ),
    ],
)
def test_how_far_shapes_are_stretched_is_said_with_what_avoids_it(tmp_path, capsys, sizes, advice):
    (tmp_path / "trainA").mkdir()
    for i, size in enumerate(sizes):
        noise_image(i, size).save(tmp_path / "trainA" / f"{i}.png")
    checks.check_split(tmp_path, "trainA")
    out = capsys.readouterr().out
    assert ("stretches" in out) == bool(advice)
    assert advice is None or f"{advice}\n" in out


@pytest.mark.parametrize(("photos", "labels", "is_said"), [(0, 3, True), (2, 3, False), (1, 9, True)])
def test_images_of_few_colours_are_recommended_to_be_resized_without_mixing_them(
    tmp_path, capsys, photos, labels, is_said
):
    (tmp_path / "trainB").mkdir()
    for i in range(photos):
        noise_image(i, (40, 40)).save(tmp_path / "trainB" / f"photo{i}.png")
    for i in range(labels):
        image = noise_image(i, (8, 4)).resize((40, 40), Image.Resampling.NEAREST)
        image.save(tmp_path / "trainB" / f"{i}.png")
    checks.check_split(tmp_path, "trainB")
    found = (
        f"{labels} of {photos + labels} have at most 32 colours; if these are labels, --resample_B nearest mixes no new"
    )
    assert (found in capsys.readouterr().out) == is_said
