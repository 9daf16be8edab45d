"""The code and the committed results of benchmark.py; not part of the wheel."""
