"""The misalignment benchmark: held-out people whose references fit their clips, or not, in five ways."""
