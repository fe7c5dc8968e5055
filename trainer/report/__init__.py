"""A sweep drawn as one HTML page.

The files of a folder of runs come in, as they are on disk.
One HTML file goes out that needs no network.
Nothing here may compute a metric, load a language model, or put a string into the page unescaped.

Public:
    report.write_report: writes the page about a sweep
    page.page: the HTML of the whole page
    figures.figures: what the page draws of each run
    feature_pages.feature_pages: what the page shows of features
"""
