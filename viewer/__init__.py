"""The page that `python -m viewer` serves: reference attention of a clicked point, and animation of a photograph."""
