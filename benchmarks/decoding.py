"""Picture file -> (H, W, 3) uint8: our pre-processing against OpenCV's and torchvision's, and Pillow's short cuts.

    python decoding.py

Files of made-up scenes with the fine grain of a photograph, JPEG (quality 90, 4:2:0) and PNG. Each way gets one thread,
as the pictures of a batch are decoded side by side. The libraries' filters differ, so pixels are compared within a
bound; a short cut would change the pre-processing that a bundle states, and is here to show what that would bring.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import click
import cv2
import numpy as np
import torch
from measuring import in_turns, medians, print_machine, print_table
from PIL import Image, ImageFilter
from torchvision.io import ImageReadMode, decode_image, read_file
from torchvision.transforms.v2 import functional

from siamese_deploy.demo_data import draw_character
from siamese_deploy.preprocess import Preprocess, load_image

SIZES = ("640x480", "1920x1080", "4000x3000")
OURS = "ours"
PIXELS_A_ROUND = 6_000_000
# Mean difference to our pixels, in grey levels of 255: another filter, but the same picture.
SAME_FILTER, OTHER_FILTER = 1.0, 8.0

Read = Callable[[Path, tuple[int, int]], np.ndarray]


@click.command()
@click.option("--size", "sizes", multiple=True, default=SIZES, show_default=True, help="Width x height of the files.")
@click.option("--image_size", default=224, show_default=True, help="Side of what comes out, in pixels.")
@click.option("--pictures", type=click.IntRange(1), default=3, show_default=True, help="Of each size and format.")
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Of OpenCV and of torchvision.")
def main(sizes: tuple[str, ...], image_size: int, pictures: int, rounds: int, threads: int) -> None:
    print_machine("pillow", "opencv-python-headless", "torch", "torchvision", "numpy")
    cv2.setNumThreads(threads)
    torch.set_num_threads(threads)
    print(f"to {image_size} x {image_size} px; {threads} threads, Pillow one; {rounds} rounds")
    with tempfile.TemporaryDirectory() as name:
        for size in sizes:
            width, height = map(int, size.split("x"))
            scenes = [scene(seed, width, height) for seed in range(pictures)]
            for suffix in ("jpg", "png"):
                files = [save(image, Path(name, f"{size}-{seed}.{suffix}")) for seed, image in enumerate(scenes)]
                compare(f"{size}, {'JPEG' if suffix == 'jpg' else 'PNG'}", files, (image_size, image_size), rounds)


def scene(seed: int, width: int, height: int) -> Image.Image:
    """Soft colours of several scales, characters of all sizes on it, slight blur of a lens and grain of a sensor."""
    random = np.random.default_rng(seed)
    colours = np.zeros((height, width, 3), np.float32)
    for cells, strength in ((3, 90), (12, 40), (48, 15)):
        rough = random.normal(0, strength, (cells * 3, cells * 4, 3)).astype(np.float32)
        colours += cv2.resize(rough, (width, height), interpolation=cv2.INTER_CUBIC)
    image = Image.fromarray((128 + colours).clip(0, 255).astype(np.uint8))
    for number in range(24):
        side = int(height * random.uniform(0.05, 0.4))
        character = draw_character(seed * 100 + number, number).resize((side, side), Image.Resampling.BICUBIC)
        place = int(random.uniform(0, width - side)), int(random.uniform(0, height - side))
        ink = character.convert("L").point(lambda grey: 255 if grey < 160 else 0)
        image.paste(tuple(random.integers(0, 256, 3).tolist()), place, ink)
    blurred = np.asarray(image.filter(ImageFilter.GaussianBlur(0.8)), np.float32)
    grain = random.normal(0, 3, blurred.shape).astype(np.float32)
    return Image.fromarray((blurred + grain).clip(0, 255).astype(np.uint8))


def save(image: Image.Image, path: Path) -> Path:
    """JPEG with the quality and colour sampling usual for photographs; PNG as Pillow packs it by itself."""
    image.save(path, **({"quality": 90, "subsampling": "4:2:0"} if path.suffix == ".jpg" else {}))
    return path


def ours(path: Path, size_hw: tuple[int, int]) -> np.ndarray:
    return load_image(path, Preprocess(size_hw))


def with_opencv(interpolation: int) -> Read:
    def read(path: Path, size_hw: tuple[int, int]) -> np.ndarray:
        image = cv2.cvtColor(cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
        return np.asarray(cv2.resize(image, size_hw[::-1], interpolation=interpolation))

    return read


def with_torchvision(path: Path, size_hw: tuple[int, int]) -> np.ndarray:
    image = decode_image(read_file(str(path)), ImageReadMode.RGB)
    resized: torch.Tensor = functional.resize(image, list(size_hw), antialias=True)
    return resized.permute(1, 2, 0).contiguous().numpy()


def with_pillow(*, draft: float | None = None, gap: float | None = None) -> Read:
    """Our decoder and resizer with a short cut.

    Args:
        draft: JPEG is decoded at 1/2, 1/4 or 1/8, at least so many times the size asked for.
        gap: pixels are averaged in blocks first, down to at least so many times the size asked for.
    """

    def read(path: Path, size_hw: tuple[int, int]) -> np.ndarray:
        height, width = size_hw
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            if draft is not None:
                image.draft("RGB", (round(width * draft), round(height * draft)))
            resized = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR, reducing_gap=gap)
            return np.asarray(resized)

    return read


WAYS: dict[str, tuple[Read, float]] = {
    OURS: (ours, 0.0),
    "OpenCV, INTER_AREA": (with_opencv(cv2.INTER_AREA), OTHER_FILTER),
    "OpenCV, INTER_LINEAR (not antialiased)": (with_opencv(cv2.INTER_LINEAR), OTHER_FILTER),
    "torchvision, antialias": (with_torchvision, SAME_FILTER),
    "information: Pillow, no checks": (with_pillow(), 0.0),
    "information: Pillow, reducing_gap=2": (with_pillow(gap=2), OTHER_FILTER),
    "information: Pillow, reducing_gap=3": (with_pillow(gap=3), OTHER_FILTER),
}
"""Name -> how, and how far its pixels may be from ours on average."""
JPEG_WAYS: dict[str, tuple[Read, float]] = {
    "information: Pillow, draft of 1x": (with_pillow(draft=1), OTHER_FILTER),
    "information: Pillow, draft of 2x": (with_pillow(draft=2), OTHER_FILTER),
}


def compare(title: str, files: list[Path], size_hw: tuple[int, int], rounds: int) -> None:
    ways = WAYS | (JPEG_WAYS if files[0].suffix == ".jpg" else {})
    expected = [ours(path, size_hw) for path in files]
    mean, largest = {}, {}
    for name, (read, limit) in ways.items():
        found = [read(path, size_hw) for path in files]
        assert all(image.shape == (*size_hw, 3) and image.dtype == np.uint8 for image in found), name
        differences = np.abs(np.stack(found).astype(int) - np.stack(expected))
        mean[name], largest[name] = differences.mean(), differences.max()
        assert mean[name] <= limit, (title, name, mean[name])
    with Image.open(files[0]) as image:
        repeats = max(1, PIXELS_A_ROUND // (image.width * image.height * len(files)))
    todo = files * repeats
    turns = {name: every_file(read, todo, size_hw) for name, (read, _) in ways.items()}
    seconds = {name: value / len(todo) for name, value in medians(in_turns(turns, rounds)).items()}
    rows = [
        (name, f"{value * 1e3:.2f}", f"{value / seconds[OURS]:.2f}", f"{mean[name]:.2f}", largest[name], "nothing")
        for name, value in seconds.items()
    ]
    megabytes = sum(path.stat().st_size for path in files) / len(files) / 1e6
    header = ("way", "ms a picture", "time / ours", "mean difference to ours", "largest", "promised")
    print_table(f"{title}, {megabytes:.2f} MB a file", header, rows)


def every_file(read: Read, files: Iterable[Path], size_hw: tuple[int, int]) -> Callable[[], object]:
    return lambda: [read(path, size_hw) for path in files]


if __name__ == "__main__":
    main()
