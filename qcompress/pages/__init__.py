"""Pages that open offline: a run as one HTML file with pictures to point at."""

from qcompress.pages.report_page import write_report_page

__all__ = ["write_report_page"]
