"""A page in a real browser: headless Chromium, driven by its own chromedriver.

python tests/report/browser.py      docs/images/report-light.png and docs/images/report-dark.png of build/report.html
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
SHOWN = (1280, 3440)  # of docs/images/, in pixels of the page: down to the errors of the nodes


@contextmanager
def chromium() -> Iterator[Chrome]:
    """A browser of its own, in an empty profile that goes with it."""
    os.environ["SE_OFFLINE"] = "true"  # the driver is the one beside the browser: nothing is to be looked up, or told
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


def show(driver: Chrome, page: Path, scheme: str, width: int, height: int = 900) -> None:
    """Load a page in a window of this width; scheme: what the reader prefers, "light" or "dark"."""
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
    )
    driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    driver.get(page.absolute().as_uri())


def picture(driver: Chrome, width: int, height: int) -> Image.Image:
    """The page's upper left corner, of this size."""
    taken = driver.execute_cdp_cmd(
        "Page.captureScreenshot",
        {
            "format": "png",
            "captureBeyondViewport": True,
            "clip": {"x": 0, "y": 0, "width": width, "height": height, "scale": 1},
        },
    )
    return Image.open(io.BytesIO(base64.b64decode(taken["data"]))).convert("RGB")


def complaints(driver: Chrome) -> list[str]:
    """What the browser's console says: errors of the page, and what its policy has blocked."""
    return [entry["message"] for entry in driver.get_log("browser")]


def requests(driver: Chrome) -> list[str]:
    """The addresses that the page has asked for, itself among them; data: aside."""
    messages: list[dict[str, Any]] = [
        json.loads(entry["message"])["message"] for entry in driver.get_log("performance")
    ]
    sent = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
    urls = [one["request"]["url"] for one in sent if one["documentURL"] == driver.current_url]
    return [url for url in urls if not url.startswith("data:")]


def main(page: Path = Path("build/report.html"), folder: Path = Path("docs/images")) -> None:
    with chromium() as driver:
        for scheme in SCHEMES:
            show(driver, page, scheme, SHOWN[0])
            few = picture(driver, *SHOWN).quantize(128, dither=Image.Dither.NONE)
            few.save(folder / f"report-{scheme}.png", optimize=True)


if __name__ == "__main__":
    main()
