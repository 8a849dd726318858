"""The part of OpenAI's API that a host of models has: models, chat, completions."""
