"""A tiny family of text-to-image models, and the world that it was trained on."""
