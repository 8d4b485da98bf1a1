"""Published weights in and out: safetensors files, the names in them, Hugging Face directories."""
