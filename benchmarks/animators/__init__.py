"""Animators beside each other: original and misaligned clips, without and with TPC."""
