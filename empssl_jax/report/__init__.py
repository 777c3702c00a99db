"""A run as one page to look at: RUN/report.html, a single file that opens no connection.

A run is read (run.py), numbers are computed from it (findings.py) and put into words (remarks.py), curves (charts.py),
tables (tables.py) and pictures (pictures.py); page.py lays them out with the templates, write_report.py writes the
file. tensorboard.py writes the pictures for TensorBoard too. May import every room but `inference` and `training`.
"""
