"""The published animators, assembled from diffusers' stock blocks, and the pipeline that runs them."""
