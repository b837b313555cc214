"""What is in a LoRA file: its layers one by one, and what they add up to."""
