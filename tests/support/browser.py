"""Chromium without a window, looking at the page of a running replicator. It notes what a person would not see."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright

from devstack.process import ROOT, find_program

SHOTS = ROOT / "build" / "page"
"""For people to look at."""
PATIENCE_MS = 20_000.0


@contextmanager
def chromium() -> Iterator[Browser]:
    """Debian's."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_program("chromium", "chromium"))
        yield browser
        browser.close()


class Viewer:
    """Somebody who looks at the page."""

    def __init__(self, browser: Browser, address: str, **context: Any) -> None:
        """`context` as Playwright takes it: the size of the window, dark or light, scripts or none."""
        self._origin = f"http://{address}/"
        self.complaints: list[str] = []
        """Errors in the browser's console, and requests to anybody else."""
        self._context = browser.new_context(**context)
        self.page: Page = self._context.new_page()
        self.page.on("console", lambda said: self._note(said.text if said.type == "error" else ""))
        self.page.on("pageerror", lambda error: self._note(str(error)))
        self.page.on("request", lambda sent: self._note("" if sent.url.startswith(self._origin) else sent.url))
        self.page.goto(self._origin)

    def _note(self, complaint: str) -> None:
        if complaint:
            self.complaints.append(complaint)

    def sees_state(self, state: str, seconds: float = PATIENCE_MS / 1000) -> None:
        """The page has this colour, or gets it within so many seconds without being loaded again."""
        expect(self.page.locator("html")).to_have_attribute("data-state", state, timeout=1000 * seconds)

    def sees(self, part: str, text: str) -> None:
        """The part with this id says so, or will in a moment."""
        expect(self.page.locator(f"#{part}")).to_contain_text(text, timeout=PATIENCE_MS)

    def sees_no(self, part: str, text: str) -> None:
        """The part does not say so, or will not in a moment."""
        expect(self.page.locator(f"#{part}")).not_to_contain_text(text, timeout=PATIENCE_MS)

    def text(self, part: str) -> str:
        """What the part says now."""
        return self.page.locator(f"#{part}").inner_text()

    def violations(self) -> list[str]:
        """What axe-core finds that keeps people from using the page."""
        found = Axe().run(self.page).response["violations"]
        return [f"{each['id']}: {each['nodes'][0]['html']}" for each in found if each["impact"] != "minor"]

    def shoot(self, name: str) -> Path:
        """A picture of the whole page."""
        SHOTS.mkdir(parents=True, exist_ok=True)
        path = SHOTS / f"{name}.png"
        self.page.screenshot(path=path, full_page=True)
        return path

    def close(self) -> None:
        """Look no more."""
        self._context.close()
