"""Hooks of `mkdocs build`: the pages that GitHub shows in place become one site.

- Pages outside docs (the protocol, the clients, the changelog) are added below `project/`.
- Links between pages are rewritten for that, and links to files that are not in the site become plain text.
- Headings get the anchors that GitHub gives them.
- The API reference gets the signatures and the whole docstrings.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT: Final = Path(__file__).resolve().parents[1]
ROOMS: Final = (".", "bench", "clients", "clients/*", "spec", "spec/*")
"""Folders outside docs whose pages belong to the site."""

API: Final = re.compile(r"^### (\w+(?:\.\w+)*)\n\n.*?(?=^##|\Z)", re.MULTILINE | re.DOTALL)
"""A name of the API reference, and what GitHub shows of it."""

OPTIONS: Final = {
    "Code": "show_if_no_docstring: true",
    "Server": "members: [config, addresses, port, certificates, pins, ca_file, users, clients, end_sessions, start,"
    " reload, drain, wait_closed, statistics]",
    **dict.fromkeys(
        (
            *("BlockingClient", "BlockingUserSession", "Call", "Client", "ClientSession", "ConnectedClient"),
            *("Context", "Device", "Topic", "TopicEvent", "UserSession"),
        ),
        "merge_init_into_class: false",
    ),
}
"""Options of mkdocstrings by name: what the package makes shows no constructor."""

SIGNATURES: Final = {
    "connect": "connect(address: str | Sequence[str], **options: Unpack[ConnectOptions]) -> Client",
    "connect_blocking": "connect_blocking(\n    address: str | Sequence[str], **options: Unpack[ConnectOptions]\n)"
    " -> BlockingClient",
    "Server": "Server(\n    app: App | None = None,\n    config: Config | None = None,\n    *,"
    "\n    home: Path | None = None,"
    "\n    authenticators: Authenticators | None = None,\n)",
}
"""What an application passes, where the function takes more for the package itself, or is decorated."""

BOOSTS: Final = {"project/": 0.4, "reference/": 0.7, "troubleshooting.md": 0.2, "tutorial/": 2.0}
"""How much the matches of pages count in the search: a page that teaches before the one that lists all messages."""

_FENCE: Final = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)
_LINK: Final = re.compile(r"(!?)\[((?:[^][]|\[[^]]*\])*)\]\(([^)\s]+)\)")

_sources: dict[Path, str] = {}
"""The path in the site of each file, by its path in the repository."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.mdx_configs["toc"]["slugify"] = github_anchor
    return config


def github_anchor(heading: str, separator: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", separator)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside docs, and the images beside them."""
    for room in ROOMS:
        for pattern in ("*.md", "images/*"):
            for path in sorted(ROOT.glob(f"{room}/{pattern}")):
                source = f"project/{path.relative_to(ROOT).as_posix()}"
                files.append(File.generated(config, source, abs_src_path=str(path)))
    _sources.clear()
    _sources.update({Path(file.abs_src_path).resolve(): file.src_uri for file in files if file.abs_src_path})
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links, fill the API reference, and weigh the page in the search."""
    for start, boost in BOOSTS.items():
        if page.file.src_uri.startswith(start):
            page.meta["search"] = {"boost": boost}
    assert page.file.abs_src_path is not None
    here = Path(page.file.abs_src_path).resolve()
    if here.name == "api.md":
        return API.sub(api_entry, markdown)
    return outside_fences(markdown, lambda text: _LINK.sub(lambda found: link(found, here), text))


def api_entry(found: re.Match[str]) -> str:
    """Return the directive of mkdocstrings for a name, behind the anchor that GitHub gives its heading."""
    name = found[1]
    options = [OPTIONS[name]] if name in OPTIONS else []
    if name in SIGNATURES:
        text = f"### {name}\n\n```python\n{SIGNATURES[name]}\n```\n\n::: zcproto.{name}\n"
        own = "merge_init_into_class: false" if name[0].isupper() else "show_signature: false"
        options += ["show_root_heading: false", own]
    else:
        text = f'<a id="{name.lower()}"></a>\n\n::: zcproto.{name}\n'
    if options:
        text += "    options:\n" + "".join(f"      {option}\n" for option in options)
    if name == "connect":
        text += "\n::: zcproto.client.ConnectOptions\n    options:\n      heading_level: 4\n"
    return f"{text}\n"


def outside_fences(text: str, function: Callable[[str], str]) -> str:
    """Apply a function to the parts of a page that are not code blocks."""
    done, end = [], 0
    for fence in _FENCE.finditer(text):
        done += [function(text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*done, function(text[end:])])


def link(found: re.Match[str], here: Path) -> str:
    """Return a link of the page `here`, as it is in the site."""
    path, hash_sign, anchor = found[3].partition("#")
    if not path or ":" in path:
        return found[0]
    target = _sources.get((here.parent / path).resolve())
    if target is None:
        return found[2]
    way = posixpath.relpath(target, posixpath.dirname(_sources[here]) or ".")
    return f"{found[1]}[{found[2]}]({way}{hash_sign}{anchor})"
