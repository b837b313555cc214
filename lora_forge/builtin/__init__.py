"""What ships, through the same hooks as anyone: one module per extension point."""
