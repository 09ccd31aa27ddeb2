"""Calibrated references as files for models that take one reference for many frames."""
