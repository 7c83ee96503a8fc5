"""The browser that tests of widgets and explorers share, and the servers that they open in it."""

import contextlib
import importlib.util
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SHOTS = ROOT / "outputs" / "explore"  # for a person to look at
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


@contextlib.contextmanager
def chromium():
    "A browser without a window."
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield opened
        opened.close()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def server(command, url, folder, **more):
    """A server of its own settings, up when `url` answers; ended with its kernels."""
    env = dict(os.environ, JUPYTER_CONFIG_DIR=str(folder / "c"), JUPYTER_RUNTIME_DIR=str(folder / "r"),
               JUPYTER_DATA_DIR=str(folder / "d"), IPYTHONDIR=str(folder / "i"), JUPYTERLAB_WORKSPACES_DIR=str(folder / "w"),
               JUPYTERLAB_SETTINGS_DIR=str(folder / "s"), OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), **more)
    log = folder / "server.log"
    with open(log, "w") as out:
        process = subprocess.Popen([str(c) for c in command], stdout=out, stderr=subprocess.STDOUT, env=env, cwd=folder,
                                   start_new_session=True)
    try:
        for _ in range(1800):
            try:
                with contextlib.suppress(urllib.error.HTTPError): urllib.request.urlopen(url, timeout=60).read(100)
                break  # any answer is one
            except OSError:
                if process.poll() is not None: break
                time.sleep(0.1)
        assert process.poll() is None, log.read_text()[-3000:]
        yield log
    finally:
        if process.poll() is None: process.send_signal(signal.SIGTERM)
        try: process.wait(20)
        except subprocess.TimeoutExpired: process.kill()
        with contextlib.suppress(ProcessLookupError): os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def explore(folder, *arguments):
    "The address of `hific explore` with these arguments, and its log."
    port = free_port()
    url = f"http://127.0.0.1:{port}/"
    command = [sys.executable, "-c", "from hific_nb.cli import main; import sys; sys.exit(main())", "explore", *arguments,
               "--port", port, "--no-browser"]
    with server(command, url + "voila/static/", folder) as log: yield url, log


@contextlib.contextmanager
def jupyterlab(root, folder, **environment):
    "The address of a JupyterLab over the folder `root`."
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
               "--IdentityProvider.token=", f"--ServerApp.root_dir={root}", "--expose-app-in-browser", "--ServerApp.port_retries=0",
               "--LabApp.news_url=", "--LabApp.check_for_updates_class=jupyterlab.handlers.announcements.NeverCheckForUpdate"]
    with server(command, url + "/api", folder, **environment): yield url


class Page:
    """A page in the browser, and what is said in its console."""
    def __init__(self, browser, url, viewport=(1100, 1250), **options):
        self.page = browser.new_page(viewport={"width": viewport[0], "height": viewport[1]}, **options)
        self.page.set_default_timeout(60_000)
        self.errors = []
        collect_errors(self.page, self.errors)
        self.page.on("console", lambda message: message.type == "error" and self.errors.append(
            f"{message.text} {message.location.get('url', '')}"))
        self.outside = []
        self.page.on("request", lambda r: r.url.startswith(("http:", "https:", "ws:", "wss:")) and "//127.0.0.1:" not in r.url
                     and self.outside.append(r.url))
        self.page.goto(url)

    def at(self, name): return self.page.locator(name).first

    def download(self, name) -> tuple[str, bytes]:
        with self.page.expect_download() as waiting: self.at(f".hific-download-box button:text-is({name!r})").click()
        return waiting.value.suggested_filename, Path(waiting.value.path()).read_bytes()

    def shown(self, k) -> Image.Image:
        "The picture that the browser holds in its k-th place."
        data = self.page.evaluate("""async (k) => {
            const url = document.querySelectorAll('.hific-split-box img')[k].src;
            return [...new Uint8Array(await (await fetch(url)).arrayBuffer())];
        }""", k)
        return Image.open(io.BytesIO(bytes(data))).convert("RGB")

    def seen(self) -> np.ndarray:
        "What is on the screen in the box."
        self.at(".hific-split-box").scroll_into_view_if_needed()
        place = {side: round(value) for side, value in self.at(".hific-split-box").bounding_box().items()}
        return np.asarray(Image.open(io.BytesIO(self.page.screenshot(clip=place))).convert("RGB")).astype(int)

    def check_names(self) -> None:
        "Every control says what it is, to those who do not see what it stands beside; every choice, which button is pressed."
        self.page.wait_for_function("""() => {
            const root = document.querySelector(".hific-explorer, .hific-inside, .hific-gan");
            const all = (selector, name) => [...root.querySelectorAll(selector)].every((e) => e.getAttribute(name));
            return all("[role=slider], select, .widget-toggle-buttons", "aria-label")
                && all(".widget-toggle-button", "aria-pressed");
        }""", timeout=10_000)

    def shot(self, name):
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SHOTS / f"{name}.png")

    def check(self):
        assert not self.errors, self.errors
        assert not self.outside, self.outside
        self.page.close()
