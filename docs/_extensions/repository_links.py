"""Links to files and folders of the repository that are not pages, as GitHub resolves them."""

import os
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

ROOT = Path(__file__).resolve().parents[2]


class RepositoryLinks(SphinxTransform):
    """Turns relative links that no page serves into links to the repository.

    MyST would offer a file to download, and does not know folders. A link to what is not there is
    left to MyST, which warns.
    """

    default_priority = 10  # before files to download are collected

    def apply(self, **kwargs: Any) -> None:
        """Replace the links of a page."""
        for node in list(self.document.findall(is_relative_link)):
            target = str(node["reftarget"])
            if node.get("refdomain") == "doc":
                if target in self.env.found_docs:
                    continue
                # A page's name as MyST gives it, from the folder of the documentation, no suffix.
                path = Path(os.path.normpath(f"{self.env.srcdir / target}.md"))
            else:
                page = Path(self.env.doc2path(self.env.docname))
                path = Path(os.path.normpath(page.parent / target.partition("#")[0]))
            if path.is_relative_to(ROOT) and path.exists():
                anchor = f"#{node['reftargetid']}" if node.get("reftargetid") else ""
                place = path.relative_to(ROOT).as_posix()
                uri = f"{self.config.repository_url}/{place}{anchor}"
                link = nodes.reference("", "", *node.children, refuri=uri, internal=False)
                node.replace_self(link)


def is_relative_link(node: nodes.Node) -> bool:
    """Whether MyST has made a node of a relative link."""
    kinds = (addnodes.download_reference, addnodes.pending_xref)
    return isinstance(node, kinds) and node.get("reftype") == "myst"


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx's entry point."""
    app.add_config_value("repository_url", "", "env", str)
    app.add_transform(RepositoryLinks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
