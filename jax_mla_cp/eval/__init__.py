"""Long-context evaluation: passkey retrieval and perplexity, of a model in this process or of a server (docs/evaluation.md)."""
