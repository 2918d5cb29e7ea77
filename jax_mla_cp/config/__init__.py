"""The model: its shape, read from a Hugging Face config.json and checked; how its checkpoint stores matrices; the presets."""
