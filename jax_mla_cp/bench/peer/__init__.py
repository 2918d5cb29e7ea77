"""`bench peer`: the same requests to this project's engine, in process, and to any OpenAI server."""
