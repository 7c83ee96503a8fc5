"""Where the tests find photos that are not part of the repository."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared():
    "The folder with data/kodak, data/train, golden, weights: HIFIC_SHARED, else ../shared beside the repository. Only read."
    folder = Path(os.environ.get("HIFIC_SHARED") or ROOT.parent / "shared")
    if not (folder / "data" / "kodak").is_dir():
        pytest.skip(f"no photos in {folder}: set HIFIC_SHARED to the folder that holds data/kodak and data/train")
    before = set(folder.rglob("*"))
    yield folder
    left = set(folder.rglob("*")) ^ before
    assert not left, f"tests only read {folder}, but these came or went: {sorted(left)}"


@pytest.fixture
def kodak(shared):
    "The 24 photos of the Kodak set, whatever else lies beside them."
    photos = sorted((shared / "data" / "kodak").glob("kodim??.png"))
    assert len(photos) == 24
    return photos
