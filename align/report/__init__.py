"""A finished or running run as something to read: a page with curves, evaluations and samples, and a summary."""

from align.report.write import write_report

__all__ = ["write_report"]
