"""What every command shares: configuration, user errors, files written whole or not at all. Imports nothing of ours."""
