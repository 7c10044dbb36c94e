"""A real Chromium, driven over WebDriver with the standard library alone."""

import base64
import json
import re
import shutil
import subprocess
import urllib.request
from contextlib import contextmanager

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
ARGUMENTS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip


class Browser:
    """One window; `url` is that of its WebDriver session."""

    def __init__(self, url):
        self.url = url

    def post(self, path, **data):
        request = urllib.request.Request(
            f"{self.url}/{path}", json.dumps(data).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)["value"]

    def cdp(self, command, **parameters):
        """A command of the DevTools protocol."""
        return self.post("goog/cdp/execute", cmd=command, params=parameters)

    def run(self, script, *arguments):
        """What the body of a function returns on the page."""
        return self.post("execute/sync", script=script, args=list(arguments))

    def open(self, page, width, height=900, *, theme="light", media=""):
        """Show a file at a width in CSS pixels; a narrow one as a phone would."""
        self.cdp(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2, mobile=width < 640
        )
        self.cdp("Emulation.setEmulatedMedia", media=media, features=[{"name": "prefers-color-scheme", "value": theme}])
        self.post("url", url=page.as_uri())

    def picture(self, *, whole=False):
        """A PNG of what is in view, or of the whole page."""
        return base64.b64decode(self.cdp("Page.captureScreenshot", captureBeyondViewport=whole)["data"])

    def close(self):
        """End the browser."""
        urllib.request.urlopen(urllib.request.Request(self.url, method="DELETE"), timeout=60).close()

    def pdf(self):
        """The page as it is printed on A4."""
        return base64.b64decode(self.cdp("Page.printToPDF", paperWidth=8.27, paperHeight=11.69)["data"])


@contextmanager
def browser(folder):
    """A Chromium with its profile in a folder; both it and its driver end with the block."""
    with (folder / "driver.log").open("wb") as log:
        process = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=log, text=True)
    window = None
    try:
        assert process.stdout is not None
        port = next(found[1] for line in process.stdout if (found := re.search(r"successfully on port (\d+)", line)))
        options = {"binary": CHROMIUM, "args": [*ARGUMENTS, f"--user-data-dir={folder / 'profile'}"]}
        wanted = {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options}}
        driver = f"http://127.0.0.1:{port}"
        session = Browser(driver).post("session", capabilities=wanted)["sessionId"]
        window = Browser(f"{driver}/session/{session}")
        yield window
    finally:
        if window is not None:
            window.close()
        process.terminate()
        process.wait(20)
        if process.stdout is not None:
            process.stdout.close()
