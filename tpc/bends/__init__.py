"""Persons whose body parts each move by a map of their own."""
