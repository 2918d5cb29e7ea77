"""Request and response bodies: OpenAI's completions and chat APIs with the common extensions of vLLM and SGLang. `base` holds
the rules for all requests and the types of their values; docs/api.md lists every field."""
