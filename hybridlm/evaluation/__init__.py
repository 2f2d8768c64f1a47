"""What a model can do: perplexity by position, decode speed, and probes that tell mixers apart."""
