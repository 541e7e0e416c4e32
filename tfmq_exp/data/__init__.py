"""Real images and captions from local files: what generated images are compared with."""
