"""Accelerations that change the result: what each costs in quality, and what it saves."""
