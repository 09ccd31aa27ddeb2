"""The page that `viewer/__main__.py` serves: look into reference attention, and animate a photograph."""
