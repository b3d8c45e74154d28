"""Running: items and images from anywhere, generation that survives a kill, finished runs."""
