"""One Chromium and one stack for all tests of the pages."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from service.settings import Settings
from tests.pages.expected import Guarded
from tests.support.stack import KEY, ServiceThread, Stack, envoy, free_ports

if TYPE_CHECKING:
    from tests.pages.chromium import Page

HOW = "`make test-browser` installs it"


@pytest.fixture(scope="session")
def guarded(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """A real server with a file of keys, behind a real Envoy."""
    folder = tmp_path_factory.mktemp("guarded")
    keys = folder / "keys"
    keys.write_text(f"{hashlib.sha256(KEY.encode()).hexdigest()} tester\n")
    http_port, grpc_port = free_ports(2)
    settings = Settings(model_dir=model_dir, port=grpc_port, max_running=4, drain_seconds=1, api_keys_file=keys)
    with ServiceThread(settings) as service, envoy(http_port, grpc_port, folder):
        stack = Stack(http_port, grpc_port)
        stack.wait_until_ready()
        yield Guarded(stack, service.server.models[0].engine)


@pytest.fixture(scope="session")
def browser() -> tuple[str, str]:
    """The programs to run; without them, or without what drives them, tests that need them are skipped."""
    pytest.importorskip("selenium", reason=f"selenium is not installed: {HOW}")
    found = shutil.which("chromium"), shutil.which("chromedriver")
    if None in found:
        pytest.skip(f"chromium or chromedriver is not installed: {HOW}")
    return found


@pytest.fixture(scope="session")
def tab(browser: tuple[str, str], guarded: Guarded) -> Iterator[Page]:
    """A tab of Chromium on the pages of the stack."""
    from tests.pages.chromium import Page, chromium

    with chromium(*browser) as driver:
        yield Page(driver, f"http://{guarded.stack.envoy_address}", KEY)


@pytest.fixture
def page(tab: Page) -> Iterator[Page]:
    """The playground as at a first visit; afterwards it is checked that the key and all requests stayed here."""
    tab.window(1200, 1000)
    tab.open("/playground")
    tab.run("sessionStorage.clear()")
    tab.open("/playground")
    tab.wait_for_key()
    yield tab
    tab.check()
