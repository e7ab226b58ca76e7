"""Model families: configuration, one transformer, readers of weights and tokenizers."""
