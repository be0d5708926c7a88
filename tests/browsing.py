"""Pages in headless Chromium: the `browser` fixture, its size, and where to skip."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
CHROMEDRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync "
    "--disable-dev-shm-usage"
)
browser_test = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not (CHROMIUM and CHROMEDRIVER),
        reason="needs chromium and chromedriver (apt-get install chromium chromium-driver)",
    ),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A Selenium driver; its log 'browser' has what pages ask for in vain and scripts' errors."""
    if os.environ.get("NO_BROWSER"):
        pytest.skip("NO_BROWSER is set")
    selenium = pytest.importorskip("selenium.webdriver")
    options = selenium.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(CHROMEDRIVER))
    yield driver
    driver.quit()


def visit(browser: Any, url: str) -> None:
    """Open a page, with an empty log, and wait until all of it is there.

    Asked for the page that is open, the driver at times answers before the new document is there.
    """
    from selenium.webdriver.support import wait

    browser.get("about:blank")
    browser.get_log("browser")
    browser.get(url)
    whole = "return document.readyState === 'complete' && !!document.querySelector('h1')"
    wait.WebDriverWait(browser, 60).until(lambda each: each.execute_script(whole))


def resize(browser: Any, width: int) -> None:
    """Set the width in CSS pixels; below 500 the page is shown as on a phone."""
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
