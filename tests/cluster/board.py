"""A running TensorBoard, viewed in the system's Chromium."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.cluster.conftest import skip_or_fail
from tests.helpers.processes import clean_environment, free_port

RUN = "test/tensorboard"
LIMIT_MS = 60_000


class Board:
    """A TensorBoard page in a browser."""

    def __init__(self, url: str, page: object) -> None:
        self._url, self._page = url, page

    def steps(self, plugin: str, tag: str) -> list[int]:
        """Steps of a tag, from the requests that the page itself makes."""
        query = urllib.parse.urlencode({"run": RUN, "tag": tag})
        with urllib.request.urlopen(f"{self._url}/data/plugin/{plugin}/{plugin}?{query}", timeout=20) as answer:
            return [point[1] for point in json.load(answer)]

    def drawn_line(self, tag: str) -> list[float]:
        """X coordinates of the points of a tag's line."""
        self._open("scalars", tag)
        self._page.wait_for_selector("vz-line-chart2 path.line[d*=L]", state="attached", timeout=LIMIT_MS)
        drawn = self._page.locator("vz-line-chart2 path.line").first.get_attribute("d")
        return [float(x) for x in re.findall(r"[ML]\s*(-?[\d.]+)", drawn)]

    def drawn_histograms(self, tag: str) -> int:
        """Number of shapes drawn for a tag."""
        self._open("histograms", tag)
        self._page.wait_for_selector("vz-histogram-timeseries path", state="attached", timeout=LIMIT_MS)
        return self._page.locator("vz-histogram-timeseries path").count()

    def image_widths(self, tag: str) -> list[int]:
        """Widths in pixels of the images that the browser has decoded."""
        self._open("images", tag)
        pictures = self._page.locator("tf-image-loader img")
        pictures.first.wait_for(state="attached", timeout=LIMIT_MS)
        pictures.first.evaluate("image => image.decode()")
        return pictures.evaluate_all("images => images.map(image => image.naturalWidth)")

    def _open(self, tab: str, tag: str) -> None:
        self._page.goto("about:blank")  # changing only the fragment would not reload the page
        self._page.goto(f"{self._url}/?tagFilter=^{urllib.parse.quote(tag)}$#{tab}", timeout=LIMIT_MS)


@contextmanager
def open_browser() -> Iterator[object]:
    """Start the system's Chromium; it stops when the context exits."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        skip_or_fail("needs chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        skip_or_fail("needs playwright: pip install -e '.[cluster]'")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"], timeout=LIMIT_MS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def open_tensorboard(logdir: Path) -> Iterator[Board]:
    """Run ``tensorboard --logdir LOGDIR`` and a browser; both stop when the context exits."""
    port = free_port()
    command = [str(Path(sys.executable).parent / "tensorboard"), "--logdir", str(logdir), "--port", str(port)]
    with open_browser() as browser:
        with (logdir.parent / "tensorboard.log").open("w") as log:
            server = subprocess.Popen(
                [*command, "--host", "127.0.0.1"], env=clean_environment(), stdout=log, stderr=subprocess.STDOUT
            )
        try:
            url = f"http://127.0.0.1:{port}"
            _until_loaded(url, logdir.parent / "tensorboard.log")
            yield Board(url, browser.new_page(viewport={"width": 1400, "height": 1200}))
        finally:
            server.terminate()
            server.wait(timeout=20)


def _until_loaded(url: str, log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/data/plugin/scalars/tags", timeout=5) as answer:
                if json.load(answer).get(RUN):
                    return
        except OSError:
            pass
        time.sleep(0.3)
    raise AssertionError(f"TensorBoard shows no run: {log.read_text()}")
