"""Images and measures of what the models do."""
