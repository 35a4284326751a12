"""Show a page in a real browser: headless Chromium, driven by its own chromedriver.

    python tests/report/browser.py

writes docs/images/report-light.png and docs/images/report-dark.png from build/report.html.
"""

import base64
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")
SCHEMES = ("light", "dark")

FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)
DOCS_SIZE = (1280, 1120)  # of docs/images/, in pixels of the page: the models, and what to do


@contextmanager
def chromium() -> Iterator[Chrome]:
    """Start a browser with an empty profile; both are gone afterwards."""
    os.environ["SE_OFFLINE"] = "true"  # the driver is installed with the browser: Selenium need not search for one
    options = ChromeOptions()
    options.binary_location = CHROMIUM or ""
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}", "about:blank"):
            options.add_argument(flag)
        driver = Chrome(options=options, service=Service(CHROMEDRIVER))
        try:
            yield driver
        finally:
            driver.quit()


def open_page(driver: Chrome, page: Path, scheme: str, width: int, height: int = 900, media: str = "screen") -> None:
    """Load a page in a window of this size, for a reader who prefers the scheme "light" or "dark"; or on paper."""
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
    )
    driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"media": media, "features": [{"name": "prefers-color-scheme", "value": scheme}]},
    )
    driver.get(page.absolute().as_uri())


def screenshot(driver: Chrome, width: int, height: int) -> Image.Image:
    """The upper left corner of the page, in this size."""
    response = driver.execute_cdp_cmd(
        "Page.captureScreenshot",
        {
            "format": "png",
            "captureBeyondViewport": True,
            "clip": {"x": 0, "y": 0, "width": width, "height": height, "scale": 1},
        },
    )
    return Image.open(io.BytesIO(base64.b64decode(response["data"]))).convert("RGB")


def console_messages(driver: Chrome) -> list[str]:
    """The messages in the browser's console: errors of the page, and what its content policy has blocked."""
    return [entry["message"] for entry in driver.get_log("browser")]


def requests(driver: Chrome) -> list[str]:
    """The addresses that the page has requested, including its own, without data: URIs."""
    messages: list[dict[str, Any]] = [
        json.loads(entry["message"])["message"] for entry in driver.get_log("performance")
    ]
    parameters = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
    urls = [request["request"]["url"] for request in parameters if request["documentURL"] == driver.current_url]
    return [url for url in urls if not url.startswith("data:")]


def main(page: Path = Path("build/report.html"), folder: Path = Path("docs/images")) -> None:
    with chromium() as driver:
        for scheme in SCHEMES:
            open_page(driver, page, scheme, DOCS_SIZE[0])
            image = screenshot(driver, *DOCS_SIZE).quantize(128, dither=Image.Dither.NONE)
            image.save(folder / f"report-{scheme}.png", optimize=True)


if __name__ == "__main__":
    main()
