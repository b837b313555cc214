"""What families with CLIP text encoders and a UNet share; the backend of one adds what is its own."""
