"""The checks of scripts/notebooks.py find what they are there to find: each is shown a small tree with one fault."""

import contextlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output, writes
from PIL import Image

from hific_nb.data import sample_photo

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("notebooks", ROOT / "scripts" / "notebooks.py")
notebooks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(notebooks)

PICTURE = (  # a PNG of one pixel
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNkYAAAAAYAAjCB0C8AAAAASUVORK5CYII="
)


def code(source, *outputs, tags=()):
    metadata = {"tags": list(tags)} if tags else {}
    return new_code_cell(source, outputs=list(outputs), metadata=metadata)


def printed(text):
    return new_output("stream", name="stdout", text=text)


def exercise(title="### Exercise 1: add", stub="def add(a, b): return 0", check="assert add(1, 2) == 3",
             solution="def add(a, b): return a + b"):
    return [
        new_markdown_cell(title),
        code(f"#| eval: false\n{stub}", tags=["exercise"]),
        code(f"#| eval: false\n{check}", tags=["check"]),
        new_markdown_cell(f"<details><summary>Solution</summary>\n\n```python\n{solution}\n```\n\n</details>"),
    ]


def room(name, *exported, exp=None, extra=()):
    cells = [new_markdown_cell(f"# {name}\n\n> a room"), code(f"#| default_exp {exp or name}")]
    cells += [code(f"#| export\n{source}") for source in exported]
    cells += [code("print(1 + 1)", printed("2\n")), *extra, *exercise()]
    for i, cell in enumerate(cells):
        cell.id = f"{name}-{i}"
    return new_notebook(cells=cells, metadata={})


class Tree:
    """A small project: rooms 00_first and 01_second, an index, one job; clean, exported and in git."""

    def __init__(self, root):
        self.root = root
        settings = (ROOT / "settings.ini").read_text(encoding="utf-8")
        (root / "settings.ini").write_text(settings, encoding="utf-8")
        for folder in ("nbs/jobs", "nbs/explore", "hific_nb"):
            (root / folder).mkdir(parents=True)
        (root / "hific_nb" / "__init__.py").write_text(f'__version__ = "{self.version(settings)}"\n# by hand\n')
        self.put("nbs/00_first.ipynb", room("first", "import math", "def one(): return math.cos(0)"))
        self.put("nbs/01_second.ipynb", room("second", "from hific_nb.first import one", "def two(): return 2 * one()"))
        self.put("nbs/index.ipynb", new_notebook(cells=[new_markdown_cell("# Home"), code("1 + 1")], metadata={}))
        self.put("nbs/jobs/job.ipynb", new_notebook(cells=[code("steps: int = 1", tags=["parameters"])], metadata={}))
        self.export()
        self.quiet(notebooks.write_readme, root)
        self.git("init", "-q")
        self.add()

    @staticmethod
    def version(settings):
        return next(line.split("=")[1].strip() for line in settings.splitlines() if line.startswith("version"))

    @staticmethod
    def quiet(function, *args):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            result = function(*args)
        return result, out.getvalue()

    def put(self, path, nb):
        nb.metadata.setdefault("kernelspec", dict(notebooks.KERNEL))
        (self.root / path).write_text(notebooks.cleaned(writes(nb), self.root), encoding="utf-8")

    def edit(self, path, function):
        """Change a notebook, leaving it as clean as it was."""
        nb = notebooks.read(self.root / path)
        function(nb)
        self.put(path, nb)

    def export(self):
        env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
        subprocess.run([sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()"],
                       cwd=self.root, env=env, check=True, capture_output=True)

    def git(self, *args):
        subprocess.run(["git", *args], cwd=self.root, check=True, capture_output=True)

    def add(self):
        self.git("add", "-A")

    def faults(self, name=None):
        """Faults of one check, or of all of them."""
        checks = [notebooks.CHECKS[name]] if name else notebooks.CHECKS.values()
        return [fault for function in checks for fault in function(self.root)]


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    return Tree(tmp_path_factory.mktemp("tree"))


@pytest.fixture
def tree(template, tmp_path):
    copy = Tree.__new__(Tree)
    copy.root = tmp_path / "tree"
    shutil.copytree(template.root, copy.root)
    return copy


def only(faults, *words):
    """Exactly one fault, in one line, that holds these words."""
    assert len(faults) == 1, faults
    assert "\n" not in faults[0]
    for word in words:
        assert word in faults[0]


def test_a_sound_tree_has_no_faults(tree):
    assert tree.faults() == []
    count, out = tree.quiet(notebooks.check, tree.root)
    assert count == 0 and len(out.splitlines()) == len(notebooks.CHECKS)


def test_a_fault_makes_check_fail(tree, monkeypatch):
    (tree.root / "README.md").write_text("other\n")
    monkeypatch.setattr(notebooks, "ROOT", tree.root)
    monkeypatch.setattr(notebooks.check, "__defaults__", (tree.root,))
    code, out = tree.quiet(notebooks.main, ["check"])
    assert code == 1 and "README.md: not what nbs/index.ipynb gives" in out


# ---- clean


@pytest.mark.parametrize("dirt", ["execution_count", "metadata", "format"])
def test_unclean_notebook(tree, dirt):
    path = tree.root / "nbs/00_first.ipynb"
    nb = json.loads(path.read_text())
    if dirt == "execution_count":
        nb["cells"][1]["execution_count"] = 7
    if dirt == "metadata":
        nb["cells"][1]["metadata"]["collapsed"] = True
    path.write_text(json.dumps(nb, indent=4 if dirt == "format" else 1))
    only(tree.faults("notebooks clean"), "nbs/00_first.ipynb", "nbdev_clean --fname nbs/00_first.ipynb")


def test_notebook_that_names_no_kernel(tree):
    path = tree.root / "nbs/jobs/job.ipynb"
    nb = json.loads(path.read_text())
    kernel = nb["metadata"].pop("kernelspec")
    path.write_text(notebooks.cleaned(json.dumps(nb), tree.root))
    only(tree.faults("notebooks clean"), "nbs/jobs/job.ipynb: names no kernel", "notebooks.py clean nbs/jobs/job.ipynb")
    notebooks.save(notebooks.read(path), path, tree.root)
    assert tree.faults("notebooks clean") == [] and json.loads(path.read_text())["metadata"]["kernelspec"] == kernel


def test_unreadable_notebook(tree):
    (tree.root / "nbs/jobs/job.ipynb").write_text("{")
    only(tree.faults("notebooks clean"), "nbs/jobs/job.ipynb")


def test_cleaned_is_what_nbdev_clean_writes(tree):
    """The check cleans in this process; the command a person types must come to the same bytes."""
    path = tree.root / "nbs/00_first.ipynb"
    nb = json.loads(path.read_text())
    nb["metadata"] = {"kernelspec": {"name": "python3", "display_name": "My Python", "language": "python"}, "x": 1}
    nb["cells"][1].update(execution_count=3, metadata={"tags": ["a"], "scrolled": True})
    nb["cells"][-5]["outputs"] = [{"output_type": "execute_result", "execution_count": 4, "metadata": {},
                                   "data": {"text/plain": ["<object object at 0x7f00>"]}}]
    dirty = json.dumps(nb)
    path.write_text(dirty)
    command = f"from nbdev.clean import nbdev_clean; nbdev_clean({str(path)!r})"
    subprocess.run([sys.executable, "-c", command], cwd=tree.root, check=True, capture_output=True)
    assert path.read_text() == notebooks.cleaned(dirty, tree.root) != dirty
    assert '"tags"' in path.read_text() and "0x7f00" not in path.read_text()


# ---- export


def test_modified_module(tree):
    with open(tree.root / "hific_nb/first.py", "a") as f:
        f.write("\nx = 1\n")
    only(tree.faults("export in sync"), "hific_nb/first.py: modified", "nbdev_export")


def test_edited_notebook_without_export(tree):
    tree.edit("nbs/01_second.ipynb", lambda nb: nb.cells[3].update(source="#| export\ndef two(): return 2"))
    only(tree.faults("export in sync"), "hific_nb/second.py: modified")


@pytest.mark.parametrize("tracked", [True, False])
def test_stale_module(tree, tracked):
    (tree.root / "hific_nb/old.py").write_text("x = 1\n")
    if tracked:
        tree.add()
    faults = tree.faults("export in sync")
    only([f for f in faults if "stale" in f], "hific_nb/old.py: stale")
    assert any("not in git" in f for f in faults) != tracked


def test_renamed_notebook_leaves_a_stale_module(tree):
    (tree.root / "nbs/01_second.ipynb").unlink()
    tree.put("nbs/01_other.ipynb", room("other", "def two(): return 2"))
    tree.export()
    tree.add()
    faults = tree.faults("export in sync")
    only([f for f in faults if "_modidx.py" not in f], "hific_nb/second.py: stale", "git rm -f hific_nb/second.py")


def test_untracked_module(tree):
    tree.put("nbs/02_third.ipynb", room("third", "def three(): return 3"))
    tree.export()
    only(tree.faults("export in sync"), "hific_nb/third.py: not in git", "git add hific_nb/third.py")


def test_missing_module(tree):
    (tree.root / "hific_nb/first.py").unlink()
    assert "hific_nb/first.py: missing, a notebook exports it: run `nbdev_export`" in tree.faults("export in sync")


def test_hand_written_init_is_exempt(tree):
    init = tree.root / "hific_nb/__init__.py"
    init.write_text(init.read_text() + "from .first import one\n")
    assert tree.faults("export in sync") == []


def test_ignored_module_is_stale_too(tree):
    """A module that .gitignore hides would still be imported and packed."""
    (tree.root / ".gitignore").write_text("hific_nb/hidden.py\n")
    tree.add()
    (tree.root / "hific_nb/hidden.py").write_text("")
    assert any("hific_nb/hidden.py: stale" in f for f in tree.faults("export in sync"))


def test_works_without_git(tree):
    shutil.rmtree(tree.root / ".git")
    assert tree.faults() == []


# ---- structure


@pytest.mark.parametrize("number", [0, 2])
def test_job_needs_one_parameters_cell(tree, number):
    cells = [code(f"x = {i}", tags=["parameters"]) for i in range(number)] or [code("x = 1")]
    tree.put("nbs/jobs/job.ipynb", new_notebook(cells=cells, metadata={}))
    only(tree.faults("one module a room, one parameters cell a job"), "nbs/jobs/job.ipynb", f"{number} code cells")


def test_parameters_tag_on_markdown_does_not_count(tree):
    cell = new_markdown_cell("text", metadata={"tags": ["parameters"]})
    tree.put("nbs/jobs/job.ipynb", new_notebook(cells=[cell, code("x = 1")], metadata={}))
    only(tree.faults("one module a room, one parameters cell a job"), "0 code cells")


@pytest.mark.parametrize("source, said", [
    ("a: int = 1 << 20", "parameter a "), ("a = 1\nimport os", "in line 2"), ("a = dict(b=1)", "parameter a "),
    ("a: int", "parameter a "), ("a, b = 1, 2", "in line 1"),
])
def test_parameter_that_papermill_could_not_set(tree, source, said):
    tree.put("nbs/jobs/job.ipynb", new_notebook(cells=[code(source, tags=["parameters"])], metadata={}))
    only(tree.faults("one module a room, one parameters cell a job"), "nbs/jobs/job.ipynb", said)


def test_parameters_with_types_and_comments(tree):
    source = "a: int = -1  # steps\nb = [1, 2.5, None]\n# c\nc: str = 'x'"
    tree.put("nbs/jobs/job.ipynb", new_notebook(cells=[code(source, tags=["parameters"])], metadata={}))
    assert tree.faults("one module a room, one parameters cell a job") == []


def test_two_notebooks_of_one_module(tree):
    tree.put("nbs/02_third.ipynb", room("third", "x = 1", exp="first"))
    faults = tree.faults("one module a room, one parameters cell a job")
    assert any("first: exported by nbs/00_first.ipynb and nbs/02_third.ipynb" in f for f in faults)
    assert any("nbs/02_third.ipynb: exports to first" in f for f in faults)


def test_room_without_default_exp(tree):
    tree.edit("nbs/00_first.ipynb", lambda nb: nb.cells.pop(1))
    only(tree.faults("one module a room, one parameters cell a job"), "nbs/00_first.ipynb: exports to nothing")


def test_job_that_exports(tree):
    tree.edit("nbs/jobs/job.ipynb", lambda nb: nb.cells.append(code("#| export\ndef f(): pass")))
    only(tree.faults("one module a room, one parameters cell a job"), "nbs/jobs/job.ipynb: exports code")


def test_export_past_its_own_room(tree):
    tree.edit("nbs/00_first.ipynb", lambda nb: nb.cells.append(code("#| export second\nx = 1")))
    only(tree.faults("one module a room, one parameters cell a job"), "exports to second")


# ---- order


@pytest.mark.parametrize("statement", [
    "from hific_nb.second import two",
    "import hific_nb.second",
    "import hific_nb.second as s",
    "from hific_nb import second",
    "def f():\n    from hific_nb.second import two\n    return two",
    "import importlib\nm = importlib.import_module('hific_nb.second')",
])
def test_import_of_a_later_room(tree, statement):
    tree.put("nbs/00_first.ipynb", room("first", statement, "def one(): return 1"))
    tree.export()
    only(tree.faults("module order"), "hific_nb/first.py:", "room 00 imports second, room 01")


def test_import_of_a_later_room_in_a_cell_that_is_not_exported(tree):
    tree.edit("nbs/00_first.ipynb", lambda nb: nb.cells.append(code("%time 1\nfrom hific_nb.second import two")))
    only(tree.faults("module order"), "nbs/00_first.ipynb: cell", "room 00 imports second, room 01")


def test_import_from_the_package_itself(tree):
    """It would reach any room, and hide which."""
    tree.put("nbs/01_second.ipynb", room("second", "from hific_nb import Codec"))
    tree.export()
    only(tree.faults("module order"), "hific_nb/second.py", "from the package itself")


def test_import_of_no_room(tree):
    tree.put("nbs/01_second.ipynb", room("second", "from hific_nb.gone import x"))
    tree.export()
    only(tree.faults("module order"), "imports gone, which no room exports")


def test_a_room_may_import_its_own_module_in_its_cells(tree):
    tree.edit("nbs/00_first.ipynb", lambda nb: nb.cells.append(code("from hific_nb.first import one")))
    assert tree.faults("module order") == []


# ---- outputs


def test_room_without_outputs(tree):
    def strip(nb):
        for cell in nb.cells:
            if cell.cell_type == "code":
                cell.outputs = []
    tree.edit("nbs/00_first.ipynb", strip)
    only(tree.faults("outputs saved"), "nbs/00_first.ipynb: no outputs", "notebooks.py run nbs/00_first.ipynb")


def test_cell_that_prints_without_output(tree):
    tree.edit("nbs/00_first.ipynb", lambda nb: nb.cells.append(code("x = 3\nprint(x)")))
    only(tree.faults("outputs saved"), "prints but has no output")


@pytest.mark.parametrize("path", ["/home/jo/hific/x.py", "/tmp/tmpab12/x.hfc", "lib/site-packages/torch/nn.py"])
def test_path_of_the_machine_in_an_output(tree, path):
    tree.edit("nbs/00_first.ipynb", lambda nb: nb.cells.append(code("print(p)", printed(f"wrote {path}\n"))))
    only(tree.faults("outputs saved"), "shows a path of the machine")


@pytest.mark.parametrize("text", ["(None, None)", "<matplotlib.legend.Legend>", "(Text(0.5, 0, 'steps'),\n None)",
                                  "[<matplotlib.lines.Line2D at 0x7f>]", "Text(0, 0, 'x')"])
def test_what_a_plot_returned_in_an_output(tree, text):
    output = new_output("execute_result", data={"text/plain": text}, execution_count=1)
    tree.edit("nbs/00_first.ipynb", lambda nb: nb.cells.append(code("plt.legend()", output)))
    only(tree.faults("outputs saved"), "shows what a plot's last call returned")


def test_error_in_an_output(tree):
    error = new_output("error", ename="ValueError", evalue="no", traceback=[])
    tree.edit("nbs/index.ipynb", lambda nb: nb.cells.append(code("f()", error)))
    only(tree.faults("outputs saved"), "nbs/index.ipynb", "shows an error")


# ---- exercises


@pytest.mark.parametrize("break_it, said", [
    (lambda nb: nb.cells[-4].update(source="### Add"), "### Exercise 1"),
    (lambda nb: nb.cells.pop(-2), "tagged `check`"),
    (lambda nb: nb.cells[-2].update(source="assert False"), "eval: false"),
    (lambda nb: nb.cells[-1].update(source="Answer: a + b"), "<details>"),
    (lambda nb: nb.cells[-1].update(source=nb.cells[-1].source.replace("python", "")), "<details>"),
    (lambda nb: nb.cells.pop(-3), "follows no cell tagged `exercise`"),
])
def test_exercise_in_another_form(tree, break_it, said):
    tree.edit("nbs/00_first.ipynb", break_it)
    faults = tree.faults("exercises")
    assert faults and any(said in f for f in faults), faults


def test_room_without_exercises(tree):
    tree.edit("nbs/00_first.ipynb", lambda nb: nb.cells.__delitem__(slice(-4, None)))
    only(tree.faults("exercises"), "nbs/00_first.ipynb: no exercises")


# ---- links and README


def test_dead_link(tree):
    tree.edit("nbs/00_first.ipynb", lambda nb: nb.cells.append(new_markdown_cell("See [two](01_zwei.ipynb).")))
    only(tree.faults("links"), "nbs/00_first.ipynb", "01_zwei.ipynb")


def test_readme_is_made_from_the_index(tree):
    image = new_output("display_data", data={"image/png": PICTURE, "text/plain": "<Figure>"})
    warning = new_output("stream", name="stderr", text="a progress bar")
    result = new_output("execute_result", data={"text/plain": "42"}, execution_count=None)
    tree.put("nbs/index.ipynb", new_notebook(metadata={}, cells=[
        new_markdown_cell("# Home\n\n[room](00_first.ipynb), ![p](../docs/p.png), [web](https://x.org/a.html), "
                          "[in](#a)\n\n```\n[kept](00_first.ipynb)\n```"),
        code("#| echo: false\ndraw()", image, warning),
        code("#| hide\nsecret = 1", printed("hidden")),
        code("6 * 7", result),
    ]))
    (tree.root / "docs").mkdir(exist_ok=True)
    (tree.root / "docs/readme_9_9.png").write_bytes(b"old")
    faults = tree.faults("README.md")
    assert any(f.startswith("README.md: not what") for f in faults)
    assert any(f.startswith("docs/readme_1_0.png: not what") for f in faults)
    assert any(f.startswith("docs/readme_9_9.png: README.md no longer") for f in faults)

    tree.quiet(notebooks.write_readme, tree.root)
    assert all("not in git" in f for f in tree.faults("README.md"))
    tree.add()
    assert tree.faults("README.md") == []
    text = (tree.root / "README.md").read_text()
    assert "[room](nbs/00_first.ipynb), ![p](docs/p.png), [web](https://x.org/a.html), [in](#a)" in text
    assert "[kept](00_first.ipynb)" in text  # code stays as it is
    assert "(docs/readme_1_0.png)" in text and (tree.root / "docs/readme_1_0.png").read_bytes()[:4] == b"\x89PNG"
    assert not (tree.root / "docs/readme_9_9.png").exists()
    assert "6 * 7" in text and "    42" in text
    for absent in ("draw()", "progress bar", "secret", "hidden", "#|", "```python\n```"):
        assert absent not in text


def as_png(image):
    with io.BytesIO() as file:
        image.save(file, "PNG")
        return file.getvalue()


def test_saved_pictures_are_kept_small():
    """A plot stays what it is with a palette, a photo becomes a JPEG near it, and what has a hole stays as it is."""
    ramp = np.linspace(0, 1, 300)
    plot = np.full((200, 300, 3), 255, np.uint8)
    plot[np.clip((100 + 80 * np.sin(9 * ramp)).astype(int), 0, 199), np.arange(300)] = (31, 119, 180)
    mime, data = notebooks.smaller(as_png(Image.fromarray(plot).convert("RGBA")))
    assert mime == "image/png" and len(data) < len(as_png(Image.fromarray(plot)))
    with Image.open(io.BytesIO(data)) as kept: assert np.array_equal(np.asarray(kept.convert("RGB")), plot)

    photo = sample_photo("coffee").crop((100, 100, 400, 300))
    mime, data = notebooks.smaller(as_png(photo))
    assert mime == "image/jpeg" and len(data) < len(as_png(photo)) / 5
    with Image.open(io.BytesIO(data)) as kept: assert np.abs(np.asarray(kept, int) - np.asarray(photo, int)).mean() < 6

    hole = photo.convert("RGBA")
    hole.putalpha(128)
    assert notebooks.smaller(as_png(hole)) == ("image/png", as_png(hole))


def test_missing_index(tree):
    (tree.root / "nbs/index.ipynb").unlink()
    only(tree.faults("README.md"), "nbs/index.ipynb: missing")


# ---- run


def test_run_saves_outputs_and_cleans(tree):
    path = tree.root / "nbs/00_first.ipynb"
    where = code("import os\nprint(os.path.basename(os.getcwd()))")
    tree.edit("nbs/00_first.ipynb", lambda nb: nb.cells.insert(2, where))
    before = path.read_text()
    failed, out = tree.quiet(notebooks.run, [path], True, 60, tree.root)
    assert failed == 0 and "00_first.ipynb: " in out and path.read_text() == before  # --check writes nothing
    failed, _ = tree.quiet(notebooks.run, [path], False, 60, tree.root)
    nb = notebooks.read(path)
    assert failed == 0 and nb.cells[2].outputs[0].text == "nbs\n"  # it ran in its own folder
    assert [cell.outputs for cell in nb.cells if notebooks.is_skipped(cell)] == [[], []]
    assert tree.faults("notebooks clean") == tree.faults("outputs saved") == []
    assert [p.name for p in path.parent.iterdir() if p.name.startswith(".")] == []


def test_run_leaves_the_file_where_a_cell_fails(tree):
    path = tree.root / "nbs/00_first.ipynb"
    tree.edit("nbs/00_first.ipynb", lambda nb: nb.cells.insert(2, code("1 / 0")))
    before = path.read_bytes()
    failed, out = tree.quiet(notebooks.run, [path], False, 60, tree.root)
    assert failed == 1 and path.read_bytes() == before
    assert "cell 2 failed" in out and "1 / 0" in out and "ZeroDivisionError" in out and "\x1b" not in out


@pytest.mark.parametrize("fault, said", [
    (dict(stub="def add(a, b): return a + b"), "passes without a solution"),
    (dict(solution="def add(a, b): return a - b"), "AssertionError"),
    (dict(check="assert sum_of(1, 2) == 3", solution="def sum_of(a, b): return a + b"), "NameError"),
])
def test_exercises_are_tried(tree, fault, said):
    """What tests/test_rooms.py does with a room whose exercise cannot be failed, or cannot be solved."""
    from test_rooms import run_room

    path = tree.root / "nbs/00_first.ipynb"
    tree.edit("nbs/00_first.ipynb", lambda nb: nb.cells.__setitem__(slice(-4, None), exercise(**fault)))
    with pytest.raises((AssertionError, RuntimeError), match=said):
        run_room(path, tree.root)
