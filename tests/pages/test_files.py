"""What Envoy serves as files: the playground, the description of the API and its viewer."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
import yaml

from tests.end_to_end.test_rest import assert_envelope
from tests.support.stack import ROOT, Stack

STATIC = ROOT / "envoy" / "static"
HTML = "text/html; charset=utf-8"
SCRIPT = "text/javascript; charset=utf-8"
FILES = {
    "/": (STATIC / "playground.html", HTML),
    "/playground": (STATIC / "playground.html", HTML),
    "/playground/playground.css": (STATIC / "playground.css", "text/css; charset=utf-8"),
    "/playground/playground.js": (STATIC / "playground.js", SCRIPT),
    "/playground/completions.js": (STATIC / "completions.js", SCRIPT),
    "/playground/snippets.js": (STATIC / "snippets.js", SCRIPT),
    "/playground/tokens.js": (STATIC / "tokens.js", SCRIPT),
    "/docs": (STATIC / "docs.html", HTML),
    "/docs/docs.js": (STATIC / "docs.js", SCRIPT),
    "/docs/openapi.yaml": (ROOT / "docs" / "openapi.yaml", "application/yaml"),
    "/docs/openapi-explorer.js": (STATIC / "vendor" / "openapi-explorer.min.js", SCRIPT),
    "/docs/openapi-explorer.LICENSE": (STATIC / "vendor" / "LICENSE", "text/plain; charset=utf-8"),
}


@pytest.mark.parametrize("path", FILES)
def test_the_file_is_served_without_a_key(stack: Stack, path: str) -> None:
    """GET answers with the file's very bytes and type, HEAD with the same headers alone, a query changes nothing."""
    file, content_type = FILES[path]
    got = stack.request("GET", path, headers={})
    assert (got.status, got.headers["content-type"]) == (200, content_type)
    assert got.body == file.read_bytes()
    assert got.headers["x-content-type-options"] == "nosniff"
    assert got.headers["cache-control"] == "no-cache"
    assert got.headers["x-request-id"]

    head = stack.request("HEAD", path, headers={})
    assert (head.status, head.body) == (200, b"")
    assert head.headers["content-length"] == str(len(got.body))
    assert head.headers["content-type"] == content_type
    assert stack.request("GET", f"{path}?a=b%26c", headers={}).body == got.body


@pytest.mark.parametrize("path", FILES)
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_pages_are_only_read(stack: Stack, method: str, path: str) -> None:
    """Every other method is 405 in the error envelope, and says what is allowed."""
    answer = stack.request(method, path, "{}", {"content-type": "application/json"})
    assert answer.status == 405
    assert answer.headers["allow"] == "GET, HEAD"
    assert_envelope(answer)


@pytest.mark.parametrize("path", ["/playground/", "/docs/"])
def test_a_closing_slash_is_the_same_page(stack: Stack, path: str) -> None:
    """The pages answer with and without a slash at the end."""
    assert stack.request("GET", path, headers={}).body == stack.request("GET", path.rstrip("/"), headers={}).body


@pytest.mark.parametrize(
    "path",
    [
        "/playgrounds",
        "/docs/api.md",
        "/docs/../envoy/envoy.yaml",
        "/docs/%2e%2e/envoy.yaml",
        "/playground/tokens.js/",
        "/playground//../completion.binpb",
        "/envoy/static/playground.html",
    ],
)
def test_nothing_else_is_served(stack: Stack, path: str) -> None:
    """Other paths, and other files of the same folders, are 404 in the error envelope."""
    answer = stack.request("GET", path, headers={})
    assert answer.status == 404
    assert_envelope(answer)


def policy(stack: Stack, path: str) -> dict[str, str]:
    text = stack.request("GET", path, headers={}).headers["content-security-policy"]
    return dict(directive.strip().partition(" ")[::2] for directive in text.split(";"))


@pytest.mark.parametrize("path", ["/playground", "/docs"])
def test_pages_load_nothing_from_elsewhere(stack: Stack, path: str) -> None:
    """The policy allows this origin alone, no inline scripts, no frames around the page and no forms."""
    found = policy(stack, path)
    assert found["default-src"] == found["base-uri"] == found["form-action"] == found["frame-ancestors"] == "'none'"
    assert found["script-src"] == found["connect-src"] == "'self'"
    assert found["style-src"].startswith("'self'")


def test_the_playground_has_no_inline_code(stack: Stack) -> None:
    """The page that holds a key allows no inline styles either, and no markup made from texts."""
    found = policy(stack, "/playground")
    assert found["style-src"] == "'self'"
    assert (found["require-trusted-types-for"], found["trusted-types"]) == ("'script'", "'none'")


@pytest.mark.parametrize("page", [STATIC / "playground.html", STATIC / "docs.html"], ids=lambda page: page.name)
def test_what_pages_refer_to_is_served(page: Path) -> None:
    """Every address in a page is one of the files, another page, or empty."""
    addresses = re.findall(r'(?:src|href|spec-url)="([^"]*)"', page.read_text())
    assert len(addresses) >= 3
    assert [address for address in addresses if address not in {*FILES, "data:,"}] == []


def test_the_viewer_is_the_published_one() -> None:
    """The vendored files have the hashes beside them, against which `make viewer` checks the package."""
    folder = STATIC / "vendor"
    sums = dict(reversed(line.split()) for line in (folder / "SHA256SUMS").read_text().splitlines())
    assert sums == {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in sums}
    assert set(sums) == {"LICENSE", "openapi-explorer.min.js"}
    version = re.search(r"openapi-explorer@([\d.]+)", (ROOT / "Makefile").read_text())
    assert version is not None
    assert f"OpenAPI Explorer {version[1]} " in (folder / "openapi-explorer.min.js").read_text()[:200]


def test_containers_see_the_files() -> None:
    """Every file that Envoy's configuration names lies in a folder that docker-compose.yml mounts under /etc."""
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    mounted = [volume.split(":")[:2] for volume in compose["services"]["envoy"]["volumes"]]
    folders = [source.removeprefix("./") + "/" for source, target in mounted if target == f"/etc{source[1:]}"]
    named = re.findall(r"filename: ([\w./-]+)", (ROOT / "envoy" / "envoy.yaml").read_text())
    assert set(named) > {str(file.relative_to(ROOT)) for file, _ in FILES.values()}
    for name in named:
        assert (ROOT / name).is_file()
        assert name.startswith(tuple(folders))
