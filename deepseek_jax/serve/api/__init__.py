"""The HTTP interface: DeepSeek's and OpenAI's chat and text completions."""
