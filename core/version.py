"""The version that results carry; pyproject.toml has the same."""

VERSION = "0.1.0"
