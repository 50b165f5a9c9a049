"""Models side by side, on one page: parts of robustness_report.py."""
