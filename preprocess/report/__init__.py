"""The report of a dataset: `report.html`, for people.

Decides what a person is shown of a dataset: numbers, samples, what was left out. How it looks is
`preprocess.page`'s. Never changes stored samples, and never looks at the clock.
"""

from preprocess.report.report import REPORT_NAME, ReportSettings, make_report

__all__ = ["REPORT_NAME", "ReportSettings", "make_report"]
