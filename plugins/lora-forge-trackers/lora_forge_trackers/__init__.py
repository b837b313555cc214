"""Lifecycle observers that log every run: to TensorBoard, MLflow or Weights & Biases, through their own libraries."""
