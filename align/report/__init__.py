"""A finished or running run as something to read: a page and a Markdown file about it, and a plot of its steps."""

from align.report.serve import serve_report
from align.report.write import write_plot, write_report

__all__ = ["serve_report", "write_plot", "write_report"]
