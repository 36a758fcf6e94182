from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from conftest import RunCommand, assert_refused

from siamese_deploy.cli.demo_data import main as demo_data
from siamese_deploy.demo_data import draw_character
from siamese_deploy.image_folder import scan_image_folder


def test_draws_disjoint_classes_the_same_each_time(run: RunCommand, tmp_path: Path) -> None:
    options = ("--train_classes", 5, "--val_classes", 3, "--drawings", 4)
    for name in ("a", "b"):
        assert run(demo_data, tmp_path / name, *options).exit_code == 0
    assert run(demo_data, tmp_path / "c", *options, "--seed", 2).exit_code == 0
    train, val = scan_image_folder(tmp_path / "a/train"), scan_image_folder(tmp_path / "a/val")
    assert (len(train.class_names), len(val.class_names), len(train), len(val)) == (5, 3, 20, 12)
    assert not set(train.class_names) & set(val.class_names)

    def hashes(root: Path) -> list[str]:
        return [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(root.rglob("*.png"))]

    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    assert len({*hashes(tmp_path / "a"), *hashes(tmp_path / "c")}) == 64  # no drawing twice
    assert_refused(run(demo_data, tmp_path / "a", *options), 2, "exists already")
    assert_refused(run(demo_data, tmp_path / "x/y", *options), 2, "parent folder does not exist")


def test_names_of_many_characters_are_all_different(tmp_path: Path) -> None:
    from siamese_deploy.demo_data import _name

    assert len({_name(character) for character in range(4000)}) == 4000


def test_drawings_of_a_character_are_more_alike_than_of_two_but_not_in_colour() -> None:
    def ink(seed: int, variation: int) -> np.ndarray:
        grey = np.asarray(draw_character(seed, variation).convert("L").resize((24, 24))).astype(float)
        return (grey < (grey.min() + grey.max()) / 2).ravel()

    same = np.mean([np.mean(ink(c, 0) != ink(c, 1)) for c in range(30)])
    different = np.mean([np.mean(ink(c, 0) != ink(c + 1, 1)) for c in range(30)])
    assert same < 0.7 * different
    papers = {draw_character(1, variation).getpixel((1, 1)) for variation in range(8)}
    assert len(papers) == 8
