from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from siamese_deploy.errors import UsageError
from siamese_train.config import TrainConfig

PATHS = (Path("train"), Path("val"), Path("out"))


def test_defaults_are_the_reference_scripts() -> None:
    config = TrainConfig(*PATHS)
    assert (config.backbone, config.learning_rate, config.epochs, config.save_after) == ("resnet18", 1e-4, 1000, 25)
    assert (config.weights, config.image_size, config.batch_size) == ("default", 224, 8)
    assert config.to_json()["out_path"] == "out"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
        ("learning_rate", 0.0),
        ("learning_rate", -1e-4),
        ("learning_rate", 10.5),
        ("epochs", 0),
        ("epochs", -1),
        ("save_after", 0),
        ("image_size", 0),
        ("image_size", 100_000),
        ("batch_size", 1),
        ("workers", -1),
        ("seed", -1),
        ("seed", 2**32),
    ],
)
def test_values_out_of_range_name_the_option(field: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"--{field}: expected .* got {value}"):
        TrainConfig(*PATHS, **{field: value})
