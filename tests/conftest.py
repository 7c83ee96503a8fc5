"""Where the tests find photos that are not part of the repository."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared():
    """The folder with data/kodak, data/train, golden, weights: HIFIC_SHARED, else ../shared beside the repository."""
    folder = Path(os.environ.get("HIFIC_SHARED") or ROOT.parent / "shared")
    if not (folder / "data" / "kodak").is_dir():
        pytest.skip(f"no photos in {folder}: set HIFIC_SHARED to the folder that holds data/kodak and data/train")
    return folder
