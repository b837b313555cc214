"""LoRA files: how layers are called in them, how they are written canonically, how they are read back."""
