"""A LoRA file in another format, and several in one."""
