"""The browser that tests of widgets and explorers share."""

import importlib.util
import shutil

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync",
             "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]


def needs_browser(*packages):
    "What is missing for a test in Chromium that uses these packages, with the line to type; None where nothing is."
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing: return f"{missing[0]} is missing: pip install '.[notebooks,dev]'"
    if importlib.util.find_spec("playwright") is None: return "playwright is missing: pip install playwright"
    if CHROMIUM is None: return "no chromium: apt-get install -y chromium"
    return None


def collect_errors(page, errors):
    "Add what no script on the page caught to the list `errors`, with its stack: our own scripts come from blob: addresses."
    def add(error):
        said = error.stack or str(error)
        if str(error) == "Disposed" and "blob:" not in said: return  # JupyterLab's own, of a kernel replaced while it starts
        errors.append(said)
    page.on("pageerror", add)


def wait_for_kernel(page):
    """Until JupyterLab's open notebook has a kernel that is idle.

    Run before that, cells are cleared and not run; closed before that (or with the kernel replaced), the manager of ipywidgets
    awaits `ready` and takes the kernel of a session that is null.
    """
    page.wait_for_function("""() => {
        const session = window.jupyterapp?.shell.currentWidget?.context?.sessionContext;
        return session?.isReady && session.session?.kernel?.status === 'idle';
    }""")
