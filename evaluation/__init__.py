"""The tasks of `evaluate.py`: metrics of folders, misaligned splits, the paper's tables and figures."""
