"""Every notebook runs from top to bottom, and exercises are real: this is the one run of the notebooks in `make test`.

Jobs apart, which have tests of their own. Each notebook runs in a kernel of its own, like a reader's. After its cells every
exercise is tried: the check must fail on the stub, and pass on the solution. Kernels run side by side, one a core that pytest
itself does not use (HIFIC_WORKERS sets another number).
"""

import importlib.util
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("notebooks", ROOT / "scripts" / "notebooks.py")
notebooks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(notebooks)

ROOMS = [ROOT / path for path in notebooks.rooms(ROOT)]
OTHERS = [ROOT / "nbs" / "index.ipynb", *sorted((ROOT / "nbs" / "explore").glob("*.ipynb"))]
# An exercise whose check fails for one of these reasons is broken, not unsolved.
BROKEN = {"SyntaxError", "IndentationError", "NameError", "ImportError", "ModuleNotFoundError"}


def without_directives(source):
    return re.sub(r"^\s*#\s*\|.*\n?", "", source, flags=re.MULTILINE)


def with_exercises(nb):
    """The notebook with three cells more for each exercise: stub and check (tagged to fail), solution, check."""
    from nbformat.v4 import new_code_cell

    tried, faults = notebooks.exercises(nb)
    assert not faults, "\n".join(faults)
    for title, stub, check, solution in tried:
        stub, check = without_directives(stub), without_directives(check)
        first = new_code_cell(f"{stub}\n{check}", metadata={"tags": ["raises-exception"], "unsolved": title})
        nb.cells += [first, new_code_cell(solution), new_code_cell(check)]
    return nb


def run_room(path, root=ROOT):
    nb = notebooks.execute(with_exercises(notebooks.read(path)), path.parent, root)
    for cell in nb.cells:
        if title := cell.metadata.get("unsolved"):
            errors = [o.ename for o in cell.outputs if o.output_type == "error"]
            assert errors, f"{path.name}: the check of exercise {title!r} passes without a solution"
            assert errors[0] not in BROKEN, f"{path.name}: exercise {title!r} cannot be solved: {errors[0]}"


@pytest.fixture(scope="session")
def running(request):
    """Path -> the future of its run, for the notebooks this session selected."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = [item.callspec.params["room"] for item in request.session.items
              if getattr(item, "originalname", "") == "test_room"]
    alone = max(1, min(cores, 4) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)))
    pool = ThreadPoolExecutor(int(os.environ.get("HIFIC_WORKERS", alone)))
    yield {path: pool.submit(run_room, path) for path in wanted}
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("room", ROOMS + OTHERS, ids=lambda path: path.stem)
def test_room(room, running):
    try:
        running[room].result()
    except (AssertionError, RuntimeError) as e:  # the text says it all, the way to it would only bury it
        pytest.fail(str(e), pytrace=False)


def test_rooms_are_found():
    assert len(ROOMS) == len(list((ROOT / "nbs").glob("[0-9][0-9]_*.ipynb"))) > 0
    assert len(OTHERS) > 1
