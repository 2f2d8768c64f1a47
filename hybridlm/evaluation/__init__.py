"""Evaluation of models: perplexity by position, decode speed, tasks of lm-eval, and probes that tell mixers apart."""
