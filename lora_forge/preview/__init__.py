"""Images without and with a LoRA: render.py makes them, grid.py puts them in one picture."""
