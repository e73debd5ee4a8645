"""A page in headless Chromium: what it looks like, and what became of it."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
DARK = "--blink-settings=preferredColorScheme=0"
PATIENCE = 120  # seconds


def screenshot(page: Path, width: int, height: int, *flags: str) -> Path:
    """A PNG of the first `height` pixels of `page`, beside it."""
    picture = page.with_suffix(".png")
    picture.unlink(missing_ok=True)
    _run(page, f"--screenshot={picture}", f"--window-size={width},{height}", *flags)
    return picture


def dom(page: Path) -> str:
    """The document as it is when all has been loaded and every script has run."""
    return _run(page, "--dump-dom")


def _run(page: Path, *flags: str) -> str:
    program = shutil.which("chromium")
    if program is None:
        assert os.environ.get("DSPFX_TEST_DATA") != "required", "chromium is missing"
        pytest.skip("Debian's package chromium is not installed")
    profile = page.parent / "profile"
    command = [program, *FLAGS, f"--user-data-dir={profile}", *flags, page.as_uri()]
    try:
        done = subprocess.run(command, capture_output=True, timeout=PATIENCE, check=True)
    finally:
        shutil.rmtree(profile, ignore_errors=True)
    return done.stdout.decode()
