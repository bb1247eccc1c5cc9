"""To PyTorch: a value encoder and a pipeline that diffusers and transformers load."""
