"""The inspection page: one HTML file that shows a document in a browser."""

from qcompiler.inspection.page.render import render_page, write_page

__all__ = ["render_page", "write_page"]
