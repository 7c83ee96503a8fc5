#!/usr/bin/env python
"""Run the notebooks, check them, and make README.md from nbs/index.ipynb.

    python scripts/notebooks.py run [--check] [NB ...]    # execute; save outputs (without --check) and clean
    python scripts/notebooks.py clean [NB ...]            # nbdev_clean, and the kernel's name where it is missing
    python scripts/notebooks.py check                     # everything that can be said without executing a notebook
    python scripts/notebooks.py readme                    # nbs/index.ipynb -> README.md, its pictures in docs/
"""

import argparse
import ast
import base64
import configparser
import contextlib
import io
import os
import posixpath
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = "python scripts/notebooks.py"
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
SKIP = re.compile(r"#\s*\|\s*eval\s*:\s*false\s*$", re.IGNORECASE)
DEFAULT_EXP = re.compile(r"^#\s*\|\s*default_exp\s+(\S+)\s*$", re.MULTILINE)
EXPORT = re.compile(r"^#\s*\|\s*(export|exporti|exports)\b[ \t]*(\S*)", re.MULTILINE)
# What a saved output must not show: it differs from machine to machine, so every run would change the file.
MACHINE_PATH = re.compile(r"(?:/home/|/root/|/Users/|/tmp/|[\w.-]+/site-packages/)[^\s'\"<>)]*")
# What Matplotlib's calls return, alone or in a tuple or list: nothing a reader wants to see.
NOTHING = re.compile(r"[(\[]?(?:None,|Text\(|<matplotlib\.)")
# Without it Jupyter asks which kernel to start, and papermill finds no language.
KERNEL = {"display_name": "python3", "language": "python", "name": "python3"}
WIDGET_MIME = "application/vnd.jupyter.widget-view+json"
README_NOTE = f'<!-- Made from nbs/index.ipynb by "{SCRIPT} readme": edit the notebook, not this file. -->\n\n'


# ---------------------------------------------------------------------------------------------------- reading


def package_name(root):
    config = configparser.ConfigParser(delimiters=["="])
    config.read(root / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]["lib_name"]


def git(root, *args):
    """Lines of a git command; None where there is no git or no repository (an unpacked archive, say)."""
    try:
        done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.splitlines() if done.returncode == 0 else None


def notebooks(root):
    """Every notebook of the project, as paths relative to the root: rooms and index, jobs, explorers."""
    found = [p.relative_to(root) for p in (root / "nbs").rglob("*.ipynb")]
    return sorted(p for p in found if not any(part.startswith((".", "_")) for part in p.parts))


def rooms(root):
    return [p for p in notebooks(root) if p.parent == Path("nbs") and re.match(r"\d\d_", p.name)]


def read(path):
    import nbformat

    return nbformat.read(path, as_version=4)


def code_cells(nb):
    return [(i, cell) for i, cell in enumerate(nb.cells) if cell.cell_type == "code" and cell.source.strip()]


def directives(cell):
    """The `#|` lines a code cell begins with."""
    lines = []
    for line in cell.source.lstrip("\n").splitlines():
        if not re.match(r"\s*#\s*\|", line):
            break
        lines.append(line.strip())
    return lines


def is_skipped(cell):
    return any(SKIP.match(line) for line in directives(cell))


def cleaned(text, root):
    """What `nbdev_clean` makes of a notebook's text, with the settings of settings.ini."""
    from json import loads

    from execnb.nbio import nb2str
    from nbdev.clean import clean_nb

    config = configparser.ConfigParser(delimiters=["="])
    config.read(root / "settings.ini", encoding="utf-8")
    s = config["DEFAULT"]
    nb = loads(text)
    clean_nb(
        nb,
        clear_all=s.getboolean("clear_all", False),
        allowed_metadata_keys=s.get("allowed_metadata_keys", "").split(),
        allowed_cell_metadata_keys=s.get("allowed_cell_metadata_keys", "").split(),
        clean_ids=s.getboolean("clean_ids", True),
    )
    return nb2str(nb)


# ---------------------------------------------------------------------------------------------------- run


def execute(nb, folder, root=ROOT, timeout=600):
    """Execute the notebook `nb` in place, in a fresh kernel that works in `folder`, and return it.

    Cells that begin with `#| eval: false` are left out and keep an empty output. An error is raised with the number,
    source and traceback of its cell; a cell tagged `raises-exception` may fail.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jupyter's own, about folders and event loops
        from nbclient import NotebookClient
        from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    class Client(NotebookClient):
        current = 0

        async def async_execute_cell(self, cell, cell_index, *args, **kwargs):
            self.current = cell_index
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
                if is_skipped(cell):
                    return cell
            return await super().async_execute_cell(cell, cell_index, *args, **kwargs)

    client = Client(
        nb, kernel_name="python3", timeout=timeout, record_timing=False, store_widget_state=False,
        coalesce_streams=True, resources={"metadata": {"path": str(folder)}},
        extra_arguments=["--IPKernelApp.log_level=ERROR", "--HistoryManager.enabled=False"],
    )
    with tempfile.TemporaryDirectory() as ipython_dir:  # no profile, start-up file or history of the user's
        env = dict(os.environ, IPYTHONDIR=ipython_dir, PYDEVD_DISABLE_FILE_VALIDATION="1")
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), env.get("PYTHONPATH")]))
        try:
            client.execute(env=env)
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as e:
            raise RuntimeError(f"cell {client.current} failed:\n{indent(ANSI.sub('', str(e)))}") from None
    for _, cell in code_cells(nb):
        for output in cell.outputs:  # a widget without its live model shows an error: keep its still picture or text
            if "data" in output and len(output.data) > 1:
                output.data.pop(WIDGET_MIME, None)
            if "image/png" in output.get("data", {}):
                output.data.pop("image/jpeg", None)  # IPython also stores a lossy copy of every PIL picture
                mime, picture = smaller(base64.b64decode(output.data.pop("image/png")))
                output.data[mime] = base64.b64encode(picture).decode()
                output.metadata.pop("image/png", None)
    return nb


def smaller(png):
    """(MIME type, bytes) of a PNG picture in the form it is kept in: plots with a palette, photos as JPEG.

    As they come from matplotlib and Pillow, pictures would be most of the repository.
    """
    import numpy as np
    from PIL import Image

    with Image.open(io.BytesIO(png)) as image:
        picture = image.convert("RGBA")
    if picture.getextrema()[3][0] < 255:  # what shines through would be lost
        return "image/png", png
    picture = picture.convert("RGB")
    photo = io.BytesIO()
    picture.save(photo, "JPEG", quality=80, optimize=True)
    forms = [("image/png", png), ("image/jpeg", photo.getvalue())]
    for colours in (256, 64):
        flat, plain = picture.quantize(colours, dither=Image.Dither.NONE), io.BytesIO()
        error = np.asarray(flat.convert("RGB"), np.float32) - np.asarray(picture, np.float32)
        if np.square(error).mean() < 6:  # 40 dB
            flat.save(plain, "PNG", optimize=True)
            forms = [("image/png", png), ("image/png", plain.getvalue())]
    return min(forms, key=lambda form: len(form[1]))


def save(nb, path, root=ROOT):
    """Write a notebook, cleaned, if that changes the file."""
    import nbformat

    nb.metadata["kernelspec"] = dict(KERNEL)
    text = cleaned(nbformat.writes(nb), root)
    if text != path.read_text(encoding="utf-8"):
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)


def indent(text):
    return "\n".join("    " + line for line in text.rstrip().splitlines())


def run(paths, check=False, timeout=600, root=ROOT):
    """Execute notebooks one after another; save the outputs, cleaned, unless `check`. Return the number that failed."""
    failed = 0
    for path in paths:
        start = time.perf_counter()
        try:
            nb = execute(read(path), path.resolve().parent, root, timeout)
        except (RuntimeError, OSError, ValueError) as e:
            failed += 1
            print(f"{path}: {e}\n{path}: failed, the file is as it was", flush=True)
            continue
        seconds = time.perf_counter() - start
        if not check:
            save(nb, path, root)
        for i, cell in code_cells(nb):
            for found in machine_paths(cell):
                print(f"{path}: cell {i} shows a path of this machine: {found}", flush=True)
        print(f"{path}: {seconds:.1f} s", flush=True)
    return failed


# ---------------------------------------------------------------------------------------------------- readme


def readme(root=ROOT):
    """README.md's text and its pictures {relative path: bytes}, both from nbs/index.ipynb."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from nbconvert import MarkdownExporter
        from traitlets.config import Config

    nb = read(root / "nbs" / "index.ipynb")
    cells = []
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = relink(cell.source)
        if cell.cell_type == "code":
            lines = directives(cell)
            if any(re.match(r"#\s*\|\s*hide\s*$", line) for line in lines):
                continue
            body = cell.source.lstrip("\n").splitlines()[len(lines):]
            hide_source = any(re.match(r"#\s*\|\s*echo\s*:\s*false", line) for line in lines)
            cell.source = "" if hide_source else "\n".join(body).strip("\n")
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
            for output in cell.outputs:
                output.get("data", {}).pop(WIDGET_MIME, None)
        cells.append(cell)
    nb.cells = cells
    nb.metadata["language_info"] = {"name": "python"}  # names the language of the code blocks; cleaning removes it
    config = Config()
    config.ExtractOutputPreprocessor.output_filename_template = "docs/readme_{cell_index}_{index}{extension}"
    config.NbConvertBase.display_data_priority = [
        "text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/html", "text/plain",
    ]
    text, resources = MarkdownExporter(config=config).from_notebook_node(nb)
    text = ANSI.sub("", text)
    text = re.sub(r"```python\n+```\n*", "", text)  # the empty block that a hidden source leaves
    text = re.sub(r"!\[(?:png|jpeg|svg)\]\(", "![output](", text)
    text = "\n".join(line.rstrip() for line in text.splitlines())
    text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    return README_NOTE + text, dict(resources.get("outputs", {}))


LINK = re.compile(r"(\]\(|\b(?:src|href)=\")(?!\w+:|#|/)([^)\s\"#]+)")


def outside_fences(text):
    """(is prose, line) of every line of a markdown text."""
    fenced = False
    for line in text.split("\n"):
        fence = line.lstrip().startswith(("```", "~~~"))
        yield not (fenced or fence), line
        fenced ^= fence


def relink(text):
    """Links relative to nbs/ made relative to the root."""
    def move(match):
        return match[1] + posixpath.normpath(posixpath.join("nbs", match[2]))

    return "\n".join(LINK.sub(move, line) if prose else line for prose, line in outside_fences(text))


def write_readme(root=ROOT):
    text, pictures = readme(root)
    for old in (root / "docs").glob("readme_*"):
        if f"docs/{old.name}" not in pictures:
            old.unlink()
    for name, data in pictures.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    (root / "README.md").write_text(text, encoding="utf-8")
    print(f"README.md: {len(text.splitlines())} lines, {len(pictures)} pictures")


# ---------------------------------------------------------------------------------------------------- checks
# Each takes the root of a tree and yields one line for every fault: what is wrong, and what to type against it.


def check_clean(root):
    for path in notebooks(root):
        text = (root / path).read_text(encoding="utf-8")
        try:
            same = cleaned(text, root) == text
        except Exception as e:
            yield f"{path}: not a notebook ({e}): restore it with git"
            continue
        if read(root / path).metadata.get("kernelspec") != KERNEL:
            yield f"{path}: names no kernel: run `{SCRIPT} clean {path}`"
        elif not same:
            yield f"{path}: not clean: run `nbdev_clean --fname {path}`"


def check_structure(root):
    """One notebook a module, named alike; nothing exported from jobs and explorers; a job's one parameters cell."""
    exporters = defaultdict(list)
    for path in notebooks(root):
        cells = code_cells(read(root / path))
        names = [name for _, cell in cells for name in DEFAULT_EXP.findall(cell.source)]
        for name in names:
            exporters[name].append(str(path))
        exports = [(i, match) for i, cell in cells for match in EXPORT.finditer("\n".join(directives(cell)))]
        if path in rooms(root):
            if names != [path.stem[3:]]:
                said = " and ".join(names) or "nothing"
                yield f"{path}: exports to {said}: give it one `#| default_exp {path.stem[3:]}`"
            for i, match in exports:
                if match[2]:
                    yield f"{path}: cell {i} exports to {match[2]}, past its own room: write a plain `#| {match[1]}`"
        elif names or exports:
            yield f"{path}: exports code, which only numbered rooms do: move the code to a room of nbs/"
        if path.parent == Path("nbs/jobs"):
            tagged = sum("parameters" in cell.metadata.get("tags", []) for _, cell in cells)
            for name in (n for _, cell in cells if "parameters" in cell.metadata.get("tags", [])
                         for n in not_literal(cell.source)):
                yield f"{path}: parameter {name} is no `name = literal`, which papermill can set: write it so"
            if tagged != 1:
                yield (f"{path}: {tagged} code cells tagged `parameters`, papermill needs exactly one: "
                       "set the tag in the notebook's cell metadata")
    for name, paths in exporters.items():
        if len(paths) > 1:
            yield f"{name}: exported by {' and '.join(paths)}: rename one `#| default_exp`"


def not_literal(source):
    """What in a parameters cell is more than a name with a literal default: names, or the line of another statement."""
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        plain = isinstance(node, (ast.Assign, ast.AnnAssign)) and all(isinstance(t, ast.Name) for t in targets)
        if plain:
            try:
                ast.literal_eval(node.value)
                continue
            except (ValueError, TypeError):
                pass
        yield targets[0].id if plain else f"in line {node.lineno}"


def check_export(root):
    """The package's modules are what the notebooks export, and git knows them all."""
    package = package_name(root)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder).resolve()
        listed = git(root, "ls-files", "-co", "--exclude-standard", "--", "nbs", package, "*.ini", "*.toml")
        if listed is None:
            listed = [p.relative_to(root) for d in ("nbs", package) for p in (root / d).rglob("*")] + ["settings.ini"]
        for name in map(Path, listed):
            wanted = name.suffix in (".ipynb", ".ini", ".toml") or name == Path(package, "__init__.py")
            if wanted and (root / name).is_file():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(root / name, copy / name)
        env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
        env.update(XDG_CONFIG_HOME=folder, PYTHONWARNINGS="ignore")
        done = subprocess.run([sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()"],
                              cwd=copy, env=env, capture_output=True, text=True)
        if done.returncode:
            yield f"nbdev_export failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}: run it and read on"
            return
        made = {p.name: p.read_bytes() for p in (copy / package).glob("*.py")}
    here = {p.name: p.read_bytes() for p in (root / package).glob("*.py")}
    tracked = git(root, "ls-files", "--", package)
    for name in sorted(made.keys() | here.keys()):
        path = f"{package}/{name}"
        if name not in here:
            yield f"{path}: missing, a notebook exports it: run `nbdev_export`"
        elif name not in made:
            yield f"{path}: stale, no notebook exports it: run `git rm -f {path}` (or `rm`), or restore its notebook"
        elif made[name] != here[name] and name != "__init__.py":
            yield f"{path}: modified, its notebook exports otherwise: edit the notebook, then run `nbdev_export`"
        if name in here and tracked is not None and path not in tracked:
            yield f"{path}: not in git: run `git add {path}`"


DETAILS = re.compile(r"<details><summary>Solution</summary>\n\n(.*?)\n\n</details>", re.DOTALL)
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)\n```$", re.DOTALL | re.MULTILINE)


def folded_solution(cell):
    """The code of the solution folded away at the beginning of a cell; None where there is not exactly one block."""
    details = DETAILS.match(cell.source.lstrip()) if cell and cell.cell_type == "markdown" else None
    blocks = PYTHON_BLOCK.findall(details[1]) if details else []
    return blocks[0] if len(blocks) == 1 else None


def exercises(nb):
    """The exercises of a room, [(title, stub, check, solution)], and what is wrong with their form, [line].

    Four cells each: markdown with a line `### Exercise N: title`; a code cell tagged `exercise` and one tagged `check`,
    both not to be run; markdown that begins with the solution, folded away, which takes the place of the stub.
    """
    found, faults = [], []
    for i, cell in enumerate(nb.cells):
        tags = cell.metadata.get("tags", [])
        if "check" in tags and (i == 0 or "exercise" not in nb.cells[i - 1].metadata.get("tags", [])):
            faults.append(f"cell {i} is tagged `check` but follows no cell tagged `exercise`")
        if "exercise" not in tags:
            continue
        number = len(found) + 1
        around = [nb.cells[j] if 0 <= j < len(nb.cells) else None for j in (i - 1, i, i + 1, i + 2)]
        task, stub, check, solution = around
        line = rf"^### Exercise {number}: (.+)"
        heading = task and task.cell_type == "markdown" and re.search(line, task.source, re.MULTILINE)
        folded = folded_solution(solution)
        if not heading:
            faults.append(f"exercise {number}: cell {i - 1} must hold a line `### Exercise {number}: title`")
        if not check or "check" not in check.metadata.get("tags", []):
            faults.append(f"exercise {number}: cell {i + 1} must be its code cell, tagged `check`")
        elif not (is_skipped(stub) and is_skipped(check)):
            faults.append(f"exercise {number}: stub and check (cells {i}, {i + 1}) must begin with `#| eval: false`")
        if folded is None:
            faults.append(f"exercise {number}: cell {i + 2} must begin with `<details><summary>Solution</summary>`, a "
                          "blank line, and hold one ```python block before a blank line and `</details>`")
        found.append((heading[1] if heading else "", stub.source, check.source if check else "",
                      folded or ""))
    return found, faults


def check_exercises(root):
    """Every room ends with exercises in the form that tests/test_rooms.py can try."""
    for path in rooms(root):
        found, faults = exercises(read(root / path))
        for fault in faults:
            yield f"{path}: {fault}: see CONTRIBUTING.md"
        if not found:
            yield f"{path}: no exercises: add two or three, see CONTRIBUTING.md"


def imported_rooms(source, package):
    """(line, module) of every import of the package's own modules in `source`, wherever in the code it stands.

    An import from the package itself (`from hific_nb import Codec`) counts as the module `__init__`.
    """
    found = []

    def add(line, dotted):
        found.append((line, dotted.split(".")[0] if dotted else "__init__"))

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name == package or alias.name.startswith(package + "."):
                    add(node.lineno, alias.name[len(package) + 1:])
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                base = module
            elif module == package or module.startswith(package + "."):
                base = module[len(package) + 1:]
            else:
                continue
            if base:
                add(node.lineno, base)
            else:  # from . import config
                for alias in node.names:
                    add(node.lineno, alias.name if not alias.name[0].isupper() else "")
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            target = node.args[0].value
            if name in ("import_module", "__import__") and isinstance(target, str):
                if target.startswith("."):
                    add(node.lineno, target.lstrip("."))
                elif target == package or target.startswith(package + "."):
                    add(node.lineno, target[len(package) + 1:])
    return found


def check_order(root):
    """A room uses only rooms with smaller numbers: its module, and the cells of its notebook too."""
    package = package_name(root)
    numbers = {}
    for path in rooms(root):
        for _, cell in code_cells(read(root / path)):
            for name in DEFAULT_EXP.findall(cell.source):
                numbers[name] = int(path.name[:2])
    for name, number in numbers.items():
        module = root / package / f"{name}.py"
        if module.exists():
            for line, used in imported_rooms(module.read_text(encoding="utf-8"), package):
                if fault := order_fault(used, number, numbers, smaller=True):
                    yield f"{package}/{name}.py:{line}: {fault}"
    for path in rooms(root):
        number = int(path.name[:2])
        for i, cell in code_cells(read(root / path)):
            if any(EXPORT.match(line) for line in directives(cell)):
                continue  # read above, in the module
            source = re.sub(r"^(\s*)[%!].*", r"\1pass", cell.source, flags=re.MULTILINE)
            with contextlib.suppress(SyntaxError):  # running the notebook tells that one
                for _, used in imported_rooms(source, package):
                    if fault := order_fault(used, number, numbers, smaller=False):
                        yield f"{path}: cell {i}: {fault}"


def order_fault(used, number, numbers, smaller):
    if used == "__init__":
        return "imports from the package itself: import from the room that defines the name"
    if used not in numbers:
        return None if used.startswith("__") else f"imports {used}, which no room exports: correct the import"
    if numbers[used] > number or (smaller and numbers[used] == number):
        return (f"room {number:02d} imports {used}, room {numbers[used]:02d}: use only rooms with smaller numbers "
                "(move the code, then run `nbdev_export`)")


def machine_paths(cell):
    for output in cell.get("outputs", []):
        texts = [output.get("text", "")] + [v for k, v in output.get("data", {}).items() if k.startswith("text/")]
        for text in texts:
            text = "".join(text)
            yield from (m[0] for m in MACHINE_PATH.finditer(text))
            if str(ROOT) in text:
                yield str(ROOT)


def check_outputs(root):
    """Rooms and index are committed as they ran: with outputs, without errors, without paths of the machine."""
    for path in notebooks(root):
        fix = f"run `{SCRIPT} run {path}`"
        cells = code_cells(read(root / path))
        ran = [(i, cell) for i, cell in cells if not is_skipped(cell)]
        if path in rooms(root) and not any(cell.outputs for _, cell in ran):
            yield f"{path}: no outputs: {fix}"
            continue
        for i, cell in cells:
            if is_skipped(cell):
                if cell.outputs:
                    yield f"{path}: cell {i} is not to be run, but has outputs: {fix}"
                continue
            if any(output.output_type == "error" for output in cell.outputs):
                yield f"{path}: cell {i} shows an error: correct it and {fix}"
            if path in rooms(root) and not cell.outputs and always_prints(cell.source):
                yield f"{path}: cell {i} prints but has no output: {fix}"
            results = [output.data.get("text/plain", "") for output in cell.outputs if output.output_type == "execute_result"]
            if any(NOTHING.match(text) for text in results):
                yield f"{path}: cell {i} shows what a plot's last call returned: end it with `;`, and {fix}"
            for found in dict.fromkeys(machine_paths(cell)):
                yield f"{path}: cell {i} shows a path of the machine it ran on ({found}): print less, and {fix}"


def always_prints(source):
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return False
    calls = [n.value for n in body if isinstance(n, ast.Expr) and isinstance(n.value, ast.Call)]
    return any(isinstance(call.func, ast.Name) and call.func.id == "print" and call.args for call in calls)


def check_links(root):
    """Relative links to files in the prose of notebooks lead somewhere."""
    for path in notebooks(root):
        for i, cell in enumerate(read(root / path).cells):
            if cell.cell_type != "markdown":
                continue
            for prose, line in outside_fences(cell.source):
                for match in LINK.finditer(line) if prose else ():
                    target = match[2]
                    if re.search(r"\.\w+$", target) and not (root / path.parent / target).exists():
                        yield f"{path}: cell {i} links to {target}, which is not there: correct the link"


def check_readme(root):
    fix = f"run `{SCRIPT} readme`"
    if not (root / "nbs" / "index.ipynb").exists():
        yield "nbs/index.ipynb: missing, README.md is made from it: restore it with git"
        return
    text, pictures = readme(root)
    path = root / "README.md"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        yield f"README.md: not what nbs/index.ipynb gives: {fix}"
    tracked = git(root, "ls-files", "--", "docs", "README.md")
    for name in ["README.md", *pictures]:
        if name in pictures and (not (root / name).exists() or (root / name).read_bytes() != pictures[name]):
            yield f"{name}: not what nbs/index.ipynb gives: {fix}"
        elif tracked is not None and name not in tracked and (root / name).exists():
            yield f"{name}: not in git: run `git add {name}`"
    for old in sorted((root / "docs").glob("readme_*")):
        if f"docs/{old.name}" not in pictures:
            yield f"docs/{old.name}: README.md no longer shows it: {fix}"


CHECKS = {
    "notebooks clean": check_clean,
    "one module a room, one parameters cell a job": check_structure,
    "export in sync": check_export,
    "module order": check_order,
    "exercises": check_exercises,
    "outputs saved": check_outputs,
    "links": check_links,
    "README.md": check_readme,
}


def check(root=ROOT):
    """All checks; print the faults, one line each, and return their number."""
    faults = 0
    for title, function in CHECKS.items():
        found = list(function(root))
        faults += len(found)
        print(f"{title}: {'ok' if not found else len(found)}", *found, sep="\n  ", flush=True)
    return faults


# ---------------------------------------------------------------------------------------------------- command line


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("run", help="execute notebooks, save their outputs and clean them")
    p.add_argument("notebooks", nargs="*", type=Path, help="default: every room and the index")
    p.add_argument("--check", action="store_true", help="execute only, write nothing")
    p.add_argument("--timeout", type=int, default=600, help="seconds a cell may take (default 600)")
    p = commands.add_parser("clean", help="nbdev_clean, and the kernel's name where it is missing")
    p.add_argument("notebooks", nargs="*", type=Path, help="default: all")
    commands.add_parser("check", help="clean, in sync, in order, with outputs; README.md up to date")
    commands.add_parser("readme", help="make README.md from nbs/index.ipynb")
    args = parser.parse_args(argv)
    if args.command in ("run", "clean"):
        every = args.command == "clean"
        paths = args.notebooks or [ROOT / p for p in notebooks(ROOT) if every or p.parent == Path("nbs")]
        if missing := [str(p) for p in paths if not p.is_file()]:
            parser.error(f"no such notebook: {', '.join(missing)}")
        if args.command == "run":
            return 1 if run(paths, args.check, args.timeout) else 0
        for path in paths:
            save(read(path), path)
        return 0
    if args.command == "readme":
        write_readme()
        return 0
    return 1 if check() else 0


if __name__ == "__main__":
    sys.exit(main())
