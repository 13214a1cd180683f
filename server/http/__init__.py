"""The HTTP door: the OpenAI API over the functions of service."""
