"""Shared by every command: configuration, user errors, whole files. Imports nothing of ours."""

from core.terminal import quiet_libraries

# Here, since every command, notebook and worker process imports something of this package before it uses a network.
quiet_libraries()
