"""The files of the page, as they are served: to whom, with which headers, how large."""

from __future__ import annotations

import re
from urllib.parse import urljoin

import pytest
from fake_engine import says

from mooli.cache.match_end import MissReason
from mooli.server.page_files import page_files

HTML = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
MAX_BYTES = 150_000


def addresses(html: str) -> list[str]:
    return re.findall(r'(?:href|src)="(page/[^"]+)"', html)


def test_it_is_small():
    assert sum(map(len, page_files().files.values())) < MAX_BYTES


def test_a_browser_gets_the_page_and_others_a_word(live):
    server = live(says("yes"))
    assert server.http.get("/", headers=HTML).text.startswith("<!doctype html>")
    for accept in ("*/*", "application/json", ""):
        reply = server.http.get("/", headers={"Accept": accept})
        assert (reply.text, reply.headers["vary"]) == ("Mooli is running", "Accept")
    assert server.http.head("/", headers=HTML).status_code == 200


@pytest.mark.parametrize("path", ["/", "/docs"])
@pytest.mark.parametrize("root", ["", "/llm"])
def test_every_file_that_a_page_names_is_there(live, path, root):
    server = live(says("yes"), fastapi_root_path=root)
    page = server.http.get(path, headers=HTML)
    found = addresses(page.text)
    assert len(found) > 3
    for address in found:
        reply = server.http.get(urljoin(path, address))
        assert reply.status_code == 200, address
        assert "immutable" in reply.headers["cache-control"]
    # A proxy shows the server under a path: nothing in a page begins at the root of the site.
    assert not re.search(r'(?:href|src)="/', page.text)


def test_every_reason_why_no_more_was_cached_has_words():
    words = page_files().files["words.js"].decode()
    for reason in MissReason:
        (name,) = re.findall(rf'[ "]{reason.value}"?: "(miss_\w+)"', words)
        assert f"  {name}: [" in words


def test_modules_import_each_other_alone():
    files = page_files().files
    for name, content in files.items():
        text = content.decode()
        assert not re.search(r"(?:https?:)?//[a-z0-9.]+/\S+\.(?:js|css|woff)", text), name
        for imported in re.findall(r'(?:from |import\()"([^"]+)"', text):
            assert imported.startswith("./"), (name, imported)
            assert imported.removeprefix("./") in files, (name, imported)
        # What would make markup of a text.
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", text), name


@pytest.mark.parametrize("path", ["/", "/docs", "file"])
def test_a_browser_is_told_to_run_nothing_else(live, path):
    server = live(says("yes"))
    if path == "file":
        path = "/" + addresses(server.http.get("/", headers=HTML).text)[-1]
    headers = server.http.get(path, headers=HTML).headers
    policy = dict(rule.partition(" ")[::2] for rule in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"


@pytest.mark.parametrize("name", ["../page_files.py", "..%2Fpage_files.py", "index.html", "nothing.js", ""])
def test_only_files_of_the_page_are_served(live, name):
    assert live(says("yes")).http.get(f"/page/{page_files().version}/{name}").status_code == 404


def test_files_of_another_version_are_not_mixed_in(live):
    reply = live(says("yes")).http.get("/page/0123456789abcdef/main.js")
    assert (reply.status_code, "load it again" in reply.text) == (404, True)


def test_it_can_be_turned_off(live):
    server = live(says("yes"), no_page=True)
    assert server.http.get("/", headers=HTML).text == "Mooli is running"
    for path in ("/docs", f"/page/{page_files().version}/main.js"):
        assert server.http.get(path, headers=HTML).status_code == 404


def test_the_page_needs_no_key_and_what_it_asks_does(live):
    server = live(says("yes"), api_key="sesame")
    for path in ("/", "/docs", f"/page/{page_files().version}/main.js"):
        assert server.http.get(path, headers={**HTML, "Authorization": ""}).status_code == 200
    assert server.http.get("/openapi.json", headers={"Authorization": ""}).status_code == 401


def test_a_link_of_another_site_leads_to_the_page_and_no_further(live):
    server = live(says("yes"))
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert server.http.get("/", headers={**HTML, **link}).status_code == 200
    assert server.http.get("/docs", headers={**HTML, **link}).status_code == 200
    assert server.http.get("/v1/models", headers=link).status_code == 403
    assert server.http.get("/", headers={**HTML, **link, "Sec-Fetch-Dest": "iframe"}).status_code == 403
    assert server.http.get("/", headers={**HTML, **link, "Origin": "https://evil.example"}).status_code == 403
