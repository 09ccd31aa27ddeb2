"""The page that `viewer.py` serves: look into reference attention, and animate a photograph."""
