"""Measures of generated images and videos, and the named protocols that say how they are taken.

Nothing here reads files of frames or knows of models of ours: images, masks and keypoints come as arrays.
"""
