"""Checks the built site: every local link and anchor leads somewhere, and nothing is loaded from
elsewhere.

    python docs/tools/check_site.py build/site
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADS = {("img", "src"), ("script", "src"), ("link", "href"), ("iframe", "src"), ("source", "src")}


class Page(HTMLParser):
    """A page's links, what it loads, and the names that a link may point at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[tuple[str, bool]] = []
        self.names: set[str] = {"", "__top"}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a tag's id, and the addresses in it."""
        given = {key: value or "" for key, value in attrs}
        self.names |= {given[key] for key in ("id", "name") if key in given}
        if tag == "link" and given.get("rel") in ("canonical", "next", "prev"):
            return
        for key in ("href", "src"):
            if key in given and tag != "base":
                self.links.append((given[key], (tag, key) in LOADS))


def problems(site: Path) -> list[str]:
    """A line for each address that leads nowhere, or is loaded from another host."""
    pages = {path.resolve(): Page(path.read_text()) for path in site.rglob("*.html")}
    found = []
    for path, page in pages.items():
        if path.name == "404.html":  # its addresses are the server's
            continue
        for address, is_loaded in page.links:
            parts = urlsplit(address)
            if parts.scheme == "data" or address.startswith("javascript:"):
                continue
            if parts.netloc or parts.scheme:
                if is_loaded:
                    found.append(f"{path.relative_to(site.resolve())}: loads {address}")
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                found.append(f"{path.relative_to(site.resolve())}: no file for {address}")
            elif target in pages and unquote(parts.fragment) not in pages[target].names:
                found.append(f"{path.relative_to(site.resolve())}: no anchor for {address}")
    if not pages:
        found.append(f"{site}: no pages")
    return found


def main() -> None:
    """Print what is wrong; exit status 1 where there is something."""
    site = Path(sys.argv[1] if len(sys.argv) > 1 else "build/site")
    found = problems(site)
    print("\n".join(found) or f"{site}: every link leads somewhere, nothing comes from elsewhere")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
