"""A parser that checks the pages."""

from __future__ import annotations

from html.parser import HTMLParser


class Checker(HTMLParser):
    """Collect texts and tags. Refuse what is not well-formed, and what a browser would fetch or run."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.text: list[str] = []
        self.tags: list[str] = []
        self.cells: list[int] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe", "object", "embed", "base", "a", "foreignobject"), tag
        for name, value in attrs:
            assert name not in ("src", "href", "action", "srcset"), name
            assert name != "xlink:href" or (value or "").startswith("#"), value  # a part of the same page
            assert not name.startswith("on"), name
            if not name.startswith("xmlns"):
                assert not any(text in (value or "").replace("url(#", "") for text in ("url(", "http")), value
        self.tags.append(tag)
        if tag == "tr":
            self.cells.append(0)
        if tag in ("td", "th"):
            self.cells[-1] += 1
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            assert not any(text in data for text in ("url(", "@import"))
        else:
            self.text.append(data)


def checked(html: str) -> Checker:
    """Return the texts and tags of a page."""
    assert html.startswith("<!doctype html>\n")
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert not checker.open
    assert {"html", "head", "body", "title", "h1"} <= set(checker.tags)
    return checker
