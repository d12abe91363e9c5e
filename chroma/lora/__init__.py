"""LoRA files: any spelling in, changes of the model's own parameters out."""
