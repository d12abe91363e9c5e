"""Chroma in plain torch: model, text encoder, autoencoder, pipeline. Knows nothing of ComfyUI."""
