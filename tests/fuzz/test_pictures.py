from __future__ import annotations

from pathlib import Path

import pytest
from fuzz.driver import assert_clean, fuzz, inputs
from fuzz.pictures import LARGE, MAKERS


def test_pictures_are_decoded_or_refused_with_a_reason(tmp_path: Path) -> None:
    report = fuzz("pictures:Pictures", tmp_path, 600)
    assert_clean(report)
    # Were nearly all refused at once, little would be tested.
    assert report.outcomes["Pictures: decoded"] > 150
    assert len(report.outcomes) >= 5


@pytest.mark.slow
def test_many_pictures_are_decoded_or_refused_with_a_reason(tmp_path: Path) -> None:
    assert_clean(fuzz("pictures:Pictures", tmp_path, inputs(8_000), seed=2))


@pytest.mark.slow
def test_the_largest_pictures_are_decoded_within_the_limits(tmp_path: Path) -> None:
    report = fuzz("pictures:LargePictures", tmp_path, len(LARGE))
    assert_clean(report)
    assert set(report.outcomes) == {"LargePictures: decoded"}


def test_an_exception_that_is_let_through_is_noticed(tmp_path: Path) -> None:
    report = fuzz("pictures:Pictures", tmp_path, 600, broken=True)
    assert {f.what.partition(":")[0] for f in report.findings} & {"SyntaxError", "ValueError", "DecompressionBombError"}


def test_every_format_is_among_the_pictures() -> None:
    from siamese_deploy.preprocess import FORMATS

    assert set(MAKERS) == set(FORMATS)
