"""The report: one HTML page from results alone."""

from .page import render_report, write_report

__all__ = ["render_report", "write_report"]
