"""Side by side with published implementations, which run in their own checkout and environment: `python -m
benchmarks.speed.peers.compare`. Nothing of them is in this repository."""
