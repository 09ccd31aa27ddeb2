"""Shared by every command: configuration, user errors, whole files. Imports nothing of ours."""
