"""report.html: one file that needs nothing else; docs/report.md says how to read it.

page       the whole text, from page.html, page.css and page.js beside it
figures    headline, cards and tables    charts    SVG    slider    what the script counts with    format    digits
"""

from siamese_deploy.report_page.page import Example, report_page

__all__ = ["Example", "report_page"]
