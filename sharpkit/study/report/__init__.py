"""A study as one page that needs no network."""

from sharpkit.study.report.build import page, write_page
from sharpkit.study.report.data import ReportData, collect

__all__ = ["ReportData", "collect", "page", "write_page"]
