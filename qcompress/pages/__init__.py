"""Report pages: a run as one HTML file with interactive figures that opens offline."""

from qcompress.pages.report_page import write_report_page

__all__ = ["write_report_page"]
