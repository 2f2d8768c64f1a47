"""Operations on tensors for hybrid language models: mixers, routing, losses, each with its backends."""
