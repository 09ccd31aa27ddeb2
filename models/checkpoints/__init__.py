"""Published checkpoints: reading files, naming what is wrong with them, building networks from them."""
