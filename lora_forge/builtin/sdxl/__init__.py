"""The SDXL backend: where its weights come from, how they are read, and the small SDXL made on the spot."""
