"""What every command shares: configuration, user errors, whole files. Imports nothing of ours."""
