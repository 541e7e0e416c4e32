"""Training of the shipped text-to-image model of emojis."""
