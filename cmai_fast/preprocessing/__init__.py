"""What a processor of `transformers` does to an uploaded picture, as a differentiable function of its pixels."""
