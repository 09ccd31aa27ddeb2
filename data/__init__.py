"""Videos, poses, drawing, rendered people and data sets: everything that makes or reads training material."""
