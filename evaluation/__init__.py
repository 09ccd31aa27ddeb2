"""What `evaluate.py` does: measure folders, split data sets by misalignment, redraw the paper's tables and figures."""
