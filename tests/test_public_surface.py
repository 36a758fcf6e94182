from __future__ import annotations

from importlib import metadata

import pytest

import siamese_deploy
from siamese_deploy import errors


def test_public_names_of_the_runtime() -> None:
    assert siamese_deploy.__all__ == [
        "Bundle", "EmbeddingCache", "Evaluation", "Gallery", "OnnxVerifier", "SiameseError", "evaluate_folder",
        "read_bundle",
    ]  # fmt: skip
    for name in siamese_deploy.__all__:
        assert getattr(siamese_deploy, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Verfier'"):
        siamese_deploy.Verfier  # noqa: B018


def test_exit_codes_are_those_drawn_in_the_docstring() -> None:
    drawn = {}
    for line in (errors.__doc__ or "").splitlines():
        words = line.replace("|", " ").replace("`--", " ").replace("--", " ").split()
        if len(words) >= 2 and words[0] in vars(errors):
            drawn[words[0]] = int(words[1])
    real = {
        name: kind.exit_code
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.SiameseError)
    }
    assert drawn == real
    assert real["BusyError"] == 6


def test_the_extras_never_bring_two_onnxruntimes() -> None:
    requirements = metadata.requires("siamese-toolkit") or []
    naming_ort = [line for line in requirements if line.startswith("onnxruntime")]
    assert len(naming_ort) == 2
    assert {line.partition("extra == ")[2].strip("'\"") for line in naming_ort} == {"cpu", "gpu"}
    base = {line.partition(">")[0] for line in requirements if "extra ==" not in line}
    assert base == {"numpy", "pillow", "click", "tqdm"}
