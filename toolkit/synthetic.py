"""The demo set: the same landscape by day (A) and by night (B), drawn from a seed."""

import math
import random
from pathlib import Path

from PIL import Image, ImageDraw
from tqdm import tqdm

from datasets import DEMO
from toolkit.files import new_folder
from utils import say

SKY = {"day": ((80, 145, 230), (205, 228, 250)), "night": ((14, 18, 66), (86, 70, 130))}  # at the top, at the horizon
SUN_OR_MOON = {"day": (255, 214, 60), "night": (236, 238, 225)}
WINDOW = {"day": (74, 92, 116), "night": (255, 224, 120)}
WALLS = [(205, 120, 88), (226, 204, 160), (164, 164, 190), (196, 92, 84), (240, 236, 226)]
GROUNDS = [(70, 140, 66), (150, 160, 70), (190, 150, 90), (225, 230, 235)]
DEMO_FOLDERS = {  # time, seed of the first scene, number of scenes
    "trainA": ("day", 0, 400),
    "trainB": ("night", 100_000, 400),
    "testA": ("day", 200_000, 40),
    "testB": ("night", 200_000, 40),
}


def _mix(a: tuple, b: tuple, weight: float) -> tuple[int, ...]:
    return tuple(round(x + (y - x) * weight) for x, y in zip(a, b, strict=True))


def _at_time(colour: tuple, time: str) -> tuple:
    return _mix(colour, (16, 20, 78), 0.55) if time == "night" else colour


def _draw_disc(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, colour: tuple) -> None:
    draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour)


def _draw_sky(draw: ImageDraw.ImageDraw, rng: random.Random, side: int, time: str) -> float:
    horizon = side * rng.uniform(0.35, 0.68)  # px from the top
    for y in range(side):
        draw.line([(0, y), (side, y)], fill=_mix(*SKY[time], min(1, y / horizon)))
    for i in range(9 if time == "night" else 0):  # the same stars in all scenes
        x = random.Random(i).random() * side
        y = random.Random(1000 + i).random() * 0.3 * side
        _draw_disc(draw, x, y, side / 90, (255, 255, 240))
    x = side * rng.uniform(0.12, 0.88)
    y = side * rng.uniform(0.1, 0.28)
    _draw_disc(draw, x, y, side * rng.uniform(0.06, 0.11), SUN_OR_MOON[time])
    return horizon


def _draw_hills(draw: ImageDraw.ImageDraw, rng: random.Random, side: int, time: str, horizon: float) -> None:
    ground = rng.choice(GROUNDS)
    for layer, haze in enumerate((0.45, 0.0)):
        base = horizon + layer * side * 0.09
        phases = [rng.uniform(0, 6.28) for _ in range(3)]
        ridge = []
        for x in range(0, side + 3, 3):
            waves = sum(math.sin(x / side * (3 + 2 * i) + phase) for i, phase in enumerate(phases))
            ridge.append((x, base - side * 0.045 * waves))
        draw.polygon([*ridge, (side, side), (0, side)], fill=_at_time(_mix(ground, (150, 160, 180), haze), time))


def _draw_house(draw: ImageDraw.ImageDraw, rng: random.Random, side: int, time: str) -> None:
    x = side * rng.uniform(0.03, 0.72)
    y = side * rng.uniform(0.66, 0.92)
    w = side * rng.uniform(0.17, 0.3)
    h = w * rng.uniform(0.7, 1.2)
    draw.rectangle([x, y - h, x + w, y], fill=_at_time(rng.choice(WALLS), time))
    roof = [(x - w * 0.1, y - h), (x + w / 2, y - h * 1.6), (x + w * 1.1, y - h)]
    draw.polygon(roof, fill=_at_time((128, 52, 44), time))
    for left in (0.16, 0.58):
        draw.rectangle([x + w * left, y - h * 0.72, x + w * (left + 0.26), y - h * 0.32], fill=WINDOW[time])


def _draw_tree(draw: ImageDraw.ImageDraw, rng: random.Random, side: int, time: str) -> None:
    x = side * rng.uniform(0, 1)
    y = side * rng.uniform(0.72, 0.98)
    w = side * rng.uniform(0.1, 0.2)
    draw.rectangle([x - w * 0.08, y - w * 0.4, x + w * 0.08, y], fill=_at_time((94, 62, 40), time))
    crown = [(x - w * 0.42, y - w * 0.3), (x, y - w * 1.6), (x + w * 0.42, y - w * 0.3)]
    draw.polygon(crown, fill=_at_time((34, 104, 54), time))


def draw_scene(seed: int, time: str, size: int = 64) -> Image.Image:
    """Draw one landscape by "day" or "night" as an RGB image of (size, size) px.

    Only the colours of things, the sun or moon, and the stars, which never change, depend on the time: so the two images
    of a test pair are each other's exact truth. Scenes are drawn at three times the size, then reduced.
    """
    rng = random.Random(seed)  # the order in which its numbers are taken decides what is drawn
    side = 3 * size
    image = Image.new("RGB", (side, side))
    draw = ImageDraw.Draw(image)
    horizon = _draw_sky(draw, rng, side, time)
    _draw_hills(draw, rng, side, time, horizon)
    for _ in range(rng.randint(1, 3)):
        _draw_house(draw, rng, side, time)
    for _ in range(rng.randint(1, 4)):
        _draw_tree(draw, rng, side, time)
    return image.resize((size, size), Image.Resampling.LANCZOS)


def draw_dataset(data_root: Path, size: int = 64) -> Path:
    """Draw day2night, 400 + 400 training images and 40 test pairs; return its folder."""
    folder = data_root / DEMO
    with new_folder(folder) as unfinished:
        for name, (time, first, count) in DEMO_FOLDERS.items():
            (unfinished / name).mkdir()
            for i in tqdm(range(count), desc=f"drawing {DEMO}/{name}", leave=False):
                draw_scene(first + i, time, size).save(unfinished / name / f"{i:04d}.png")
    say(f"drew {folder} at {size}x{size} px: A = landscapes by day, B = by night")
    return folder
