"""Language models as folders that vLLM and Transformers load: GGUF files converted, and models that have names."""
