"""What LoRA weights change in what the denoiser is conditioned on: of a run, and of any file."""
