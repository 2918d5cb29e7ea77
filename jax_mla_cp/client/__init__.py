"""The OpenAI client that the evaluation and the load benchmark share. Needs aiohttp (the extras `eval` and `bench`)."""
