"""The page of ``diffmoe report`` in a browser, as wide as a desktop and as a phone."""

from __future__ import annotations

import pytest

from diffmoe_ds.cli import main
from tests.cluster.board import open_browser
from tests.helpers.reports import report_config, write_run

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.xdist_group("browser")]


def test_the_page_in_a_browser(tmp_path):
    run, out = write_run(tmp_path / "run", report_config("batch_pool")), tmp_path / "out"
    assert main(["report", str(run), "--out", str(out), "--images", "12", "--steps", "4"]) == 0
    figures = len(list((out / "figures").iterdir()))
    with open_browser() as browser:
        for width in (1280, 400):
            page = browser.new_page(viewport={"width": width, "height": 900})
            problems: list[str] = []
            page.on("console", lambda message: problems.append(message.text))  # noqa: B023 - used in this turn only
            page.on("pageerror", lambda error: problems.append(str(error)))  # noqa: B023
            page.on("requestfailed", lambda request: problems.append(request.url))  # noqa: B023
            page.goto((out / "report.html").as_uri())
            widths = page.locator("figure img").evaluate_all("images => images.map(image => image.naturalWidth)")
            assert len(widths) == figures and min(widths) > 0
            assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
            outside = "images => images.filter(image => image.getBoundingClientRect().right > innerWidth).length"
            assert page.locator("img").evaluate_all(outside) == 0
            picture = tmp_path / f"{width}.png"
            page.screenshot(path=str(picture), full_page=True)
            assert picture.stat().st_size > 50_000
            assert not problems
            page.close()
