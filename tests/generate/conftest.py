"""The tiny models, made once, and the two pictures that the tiny Florence-2 knows."""

from __future__ import annotations

import numpy as np
import pytest

LEFT, RIGHT = (5, 10, 30, 40), (40, 30, 60, 80)  # where the red and the blue box are


def red_picture() -> np.ndarray:
    picture = np.full((48, 80, 3), 30, np.uint8)
    picture[LEFT[1] : LEFT[3], LEFT[0] : LEFT[2]] = (250, 40, 40)
    return picture


def blue_picture() -> np.ndarray:
    picture = np.full((96, 64, 3), 200, np.uint8)
    picture[RIGHT[1] : RIGHT[3], RIGHT[0] : RIGHT[2]] = (20, 20, 250)
    return picture


@pytest.fixture
def folder(tmp_path):
    """A folder with an empty folder `in`."""
    (tmp_path / "in").mkdir()
    return tmp_path


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """(folder of Florence-2, folder of SAM 2). Florence-2 finds red in the red picture and blue in the blue one."""
    pytest.importorskip("transformers")
    from tests.generate import tiny

    task = "<OPEN_VOCABULARY_DETECTION>"
    lessons = [
        (red_picture(), task + "red", "red<loc_62><loc_208><loc_375><loc_833>"),
        (blue_picture(), task + "blue", "blue<loc_625><loc_312><loc_937><loc_833>"),
        (blue_picture(), task + "red", "none"),
        (red_picture(), task + "blue", "none"),
    ]
    folder = tmp_path_factory.mktemp("models")
    return tiny.florence2(folder / "florence2", lessons), tiny.sam2(folder / "sam2")


@pytest.fixture
def model_flags(models) -> list[str]:
    return ["--florence2_model", str(models[0]), "--sam2_model", str(models[1]), "--device", "cpu"]
