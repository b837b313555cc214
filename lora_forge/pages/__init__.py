"""Pages in HTML that are one file each: readable without a network, light and dark, wide and narrow."""
