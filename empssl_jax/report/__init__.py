"""The report of a run: RUN/report.html, a single file that loads nothing from the network.

run.py reads the run, findings.py computes numbers from it, and remarks.py describes them in words. charts.py draws
curves and maps, tables.py makes tables, pictures.py makes pictures. page.py fills the templates with all of these, and
write_report.py writes the file. tensorboard.py also writes the pictures for TensorBoard.

May import every subpackage except `inference`.
"""
